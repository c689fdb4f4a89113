#!/usr/bin/env python3
"""Train or evaluate a classifier: python tools/train_cls.py --help."""

from d2distill.commands import train_cls

if __name__ == "__main__":
    train_cls()
