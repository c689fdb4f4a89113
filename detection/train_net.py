#!/usr/bin/env python3
"""Train or evaluate a detector: python detection/train_net.py --help."""

from d2distill.commands import train_det

if __name__ == "__main__":
    train_det()
