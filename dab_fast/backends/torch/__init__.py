"""The backend `torch`: plain PyTorch on any device, by the specification or by something faster that is as right."""
