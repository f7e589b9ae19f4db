"""Networks: the velocity U-Net and the downstream segmenters."""
