"""Import ONNX files that contain DCNv3 in any of its forms, and export PyTorch models to them."""
