"""The pipeline that turns Parquet shards of text into a registered convolution/deconvolution language model."""
