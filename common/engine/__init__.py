"""What the classification and the detection trainer share, on Detectron2's engine."""
