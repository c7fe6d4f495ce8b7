# Two targets:
#   docker build --target cpu -t megatron-nexus:cpu .
#   docker build --target gpu -t megatron-nexus:gpu .
# Their default command trains the tiny preset into the working directory's runs/:
#   docker run --rm -v "$PWD/runs:/home/nexus/runs" megatron-nexus:cpu

ARG BASE_IMAGE=python:3.11-slim
ARG GPU_IMAGE=nvcr.io/nvidia/pytorch:25.12-py3

# ---- gpu: NVIDIA's torch and apex stay as the image has them; what it lacks is installed in addition.
# hadolint ignore=DL3006
FROM ${GPU_IMAGE} AS gpu
WORKDIR /opt/megatron_nexus
COPY pyproject.toml ./
# The image's constraints (/etc/pip/constraint.txt) hold its own packages; DeepSpeed is built against its torch.
RUN python3 -c "import tomllib; print(*(need for need in tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'] if not need.startswith(('torch', 'numpy'))), sep='\n')" > needs.txt \
    && pip install --no-cache-dir --no-build-isolation -r needs.txt
COPY . .
RUN pip install --no-cache-dir --no-deps . \
    && useradd --create-home --uid 10001 nexus
USER 10001
WORKDIR /home/nexus
CMD ["nexus", "train", "--preset", "nexusformer-tiny"]

# ---- cpu: the tested set of requirements.txt, with the CPU build of torch; no compiler, no CUDA.
# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS cpu
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /opt/megatron_nexus
COPY requirements.txt ./
RUN python3 -m venv /opt/venv \
    && grep -v '^-e' requirements.txt > pins.txt \
    && pip install --no-cache-dir -r pins.txt
COPY . .
RUN pip install --no-cache-dir --no-deps . \
    && useradd --create-home --uid 10001 nexus
USER 10001
WORKDIR /home/nexus
CMD ["nexus", "train", "--preset", "nexusformer-tiny"]
