# castlm with its CPU kernels built. For an NVIDIA GPU, replace the base image by a CUDA image that has Python 3.11+.
#   docker build -t castlm . && docker run --rm -v "$PWD:/models" castlm verify MODEL
FROM python:3.12-slim

RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/castlm
COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY runtime runtime
RUN pip install --no-cache-dir ./runtime '.[demo,report]'

WORKDIR /models
ENTRYPOINT ["castlm"]
