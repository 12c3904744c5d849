"""Tests run on few threads, so that parallel processes do not slow each other down."""

import torch

torch.set_num_threads(1)
