"""What one request may ask of a server that many share; the Python API has no such bounds."""

MAX_N = 128
MAX_LOGPROBS = 20
# More of these would slow down every step of everybody else's requests.
MAX_TEXTS = 64
MAX_TEXT_LENGTH = 1000
MAX_TOKEN_IDS = 1024
