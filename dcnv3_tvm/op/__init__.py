"""DCNv3 itself: reference, TensorIR, Relax operator, PyTorch operator; and the encoder's layers."""
