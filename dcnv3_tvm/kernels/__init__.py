"""TensorIR definitions of the encoder kernels other than DCNv3."""
