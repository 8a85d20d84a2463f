"""Converters from PyTorch operators to Relax, one family of operators a file.

A converter is a function ``(node, importer)``: `node` is the ``torch.fx`` node, `importer` is
TVM's ``ExportedProgramImporter``. It emits Relax through ``importer.block_builder`` and returns
the variable of the result. Most exist because TVM's own converter is missing or wrong; a comment
names the defect.
"""
