"""What all tests share."""

import torch

torch.set_num_threads(1)  # tiny models lose more to a second thread than they gain
