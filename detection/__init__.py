"""Distillation of Detectron2 detectors."""
