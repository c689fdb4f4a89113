"""The distillation core: tensors in, losses out. Knows no data set and no detector."""
