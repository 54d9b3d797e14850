# A CPU image that trains the demo: docker build -t simpo . && docker run --rm simpo
# On GPUs start from NGC's PyTorch image, which brings torch, Transformer Engine and apex; see docs/start/install.md.
FROM python:3.12-slim
WORKDIR /opt/simpo_megatron
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt . && useradd --create-home simpo
USER simpo
WORKDIR /home/simpo
ENV OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
ENTRYPOINT ["simpo"]
CMD ["train"]
