# tuna-peft with PyTorch for CUDA; with --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu for CPUs.
# How to run it: docs/install.md. CUDA's libraries come with PyTorch, so the base image has none.
FROM python:3.11-slim

# Triton compiles its launchers with a C compiler when a kernel first runs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --home-dir /cache tuna \
    && install -d -m 1777 /cache /work

ARG PIP_EXTRA_INDEX_URL=
WORKDIR /src
# The largest part in a layer of its own, which only other versions build again.
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY recipes recipes
COPY tuna_peft tuna_peft
RUN pip install --no-cache-dir -c constraints.txt ".[gguf,openai]"

# Models, data sets and compiled kernels go to the home folder, a volume; it is writable for any --user.
ENV HOME=/cache USER=tuna
VOLUME /cache
WORKDIR /work
USER 1000
ENTRYPOINT ["tuna-peft"]
CMD ["--help"]
