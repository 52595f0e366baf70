"""Published weights: a CLIP and a DINOv2 under merging, without training and with."""
