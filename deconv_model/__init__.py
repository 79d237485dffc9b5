"""Convolution/deconvolution language models.

The library needs torch, numpy, safetensors and tokenizers, and knows nothing of Ray, Prefect or MLflow. Import the
module that holds what you need; :mod:`deconv_model.config` is importable without torch.
"""

__version__ = "0.1.0"
