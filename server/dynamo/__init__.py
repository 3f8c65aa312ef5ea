"""A worker of NVIDIA Dynamo, whose frontends render, encode, route and detokenize."""
