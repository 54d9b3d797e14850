# A CPU image that trains the demo:
#   docker build -t simpo . && docker run --rm simpo
# PyPI's torch brings CUDA's libraries, some gigabytes. PyTorch's index of CPU builds gives a small image:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu -t simpo .
# On GPUs start from NGC's PyTorch image, which brings torch and Transformer Engine; see docs/start/install.md.
FROM python:3.12-slim
ARG PIP_EXTRA_INDEX_URL=
WORKDIR /opt/simpo_megatron
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt . && useradd --create-home simpo
USER simpo
WORKDIR /home/simpo
ENV OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
ENTRYPOINT ["simpo"]
CMD ["train"]
