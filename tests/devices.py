"""The device on which GPU kernels are tested: a GPU, or else the CPU with Triton's interpreter."""

import os

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, by transformers for example
