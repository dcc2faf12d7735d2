"""Mask R-CNN on any backbone: one adapter, two engines (He et al., 1703.06870)."""
