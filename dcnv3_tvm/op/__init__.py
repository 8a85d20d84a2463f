"""The DCNv3 operator: reference, TensorIR kernels, Relax operators."""
