# The server, for a CPU or for an NVIDIA GPU: the packages bring CUDA, the host brings the driver (580 or newer).
#
#   docker build -t sana-sprint-server:cpu .
#   docker build -t sana-sprint-server:gpu --build-arg FLAVOUR=gpu .      server cards: H100, H200, L4, A100, ...
#   docker build -t sana-sprint-server:rtx --build-arg FLAVOUR=rtx .      GeForce RTX: TensorRT for RTX
#   docker build -t sana-sprint-server:ray --build-arg FLAVOUR=ray .      gpu and Ray Serve
#
# TensorRT's libraries (gpu, ray) come from NVIDIA's own index, where their package on the default index fetches them;
# NVIDIA_INDEX names another place with these packages. Everything else comes from the default index.
# pip takes torch from where it is told to: PIP_EXTRA_INDEX_URL names an index with CPU wheels, which are ten times
# smaller than the CUDA wheels of the default index; PIP_FIND_LINKS names a folder of wheels.
ARG BASE=python:3.11-slim

FROM ${BASE} AS packages
ARG FLAVOUR=cpu
ARG NVIDIA_INDEX
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
RUN case "${FLAVOUR}" in cpu|gpu|rtx|ray) ;; \
    *) echo "FLAVOUR: got ${FLAVOUR}, allowed: cpu, gpu, rtx, ray" >&2; exit 1;; esac \
 && python3 -m venv --without-pip /venv
COPY requirements-cpu.lock requirements-gpu.lock requirements-rtx.lock requirements-ray.lock /
# Layers change in this order: base, packages, code. pip stays outside the environment that is shipped.
RUN python3 -m venv /pip \
 && /pip/bin/python -m pip --python /venv/bin/python install --no-cache-dir --no-compile \
    ${NVIDIA_INDEX:+--extra-index-url "${NVIDIA_INDEX}"} --requirement "/requirements-${FLAVOUR}.lock"
# What no server loads: headers, archives for linkers, profilers, libraries that no other one names, builders for Windows.
RUN cd /venv/lib/python3*/site-packages \
 && rm -rf nvidia/*/include nvidia/nvshmem/lib/*device* nvidia/cu13/lib/libcusolverMg.so* nvidia/cu13/lib/libnvperf_* \
    nvidia/cu13/lib/*.alt.so* nvidia/cu13/lib/libnvblas.so* nvidia/cu13/lib/libcufftw.so* \
    torch/include torch/bin/protoc* torch/share triton/backends/nvidia/lib/cupti triton/_C/libproton.so pulp/solverdir \
    tensorrt_libs/*_win.so* \
 && find . -name '*.a' -delete

FROM ${BASE}
COPY --from=packages /venv /venv
WORKDIR /app
COPY LICENSE build_engine.py ./
COPY engines engines
COPY server server
COPY models models
COPY deploy/healthcheck.py deploy/healthcheck.py
# One user without a name or a shell; two folders that outlive the container; the rest may be read-only.
RUN /venv/bin/python -m compileall -q engines server \
 && mkdir -p /weights /engines && chown 10001:10001 /weights /engines
USER 10001:10001
VOLUME ["/weights", "/engines"]
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    HF_HOME=/weights \
    XDG_CACHE_HOME=/engines/cache \
    SPRINT_HOST=0.0.0.0
EXPOSE 8000
STOPSIGNAL SIGTERM
# A first start may download weights and build engines for minutes; until then the container is "starting".
HEALTHCHECK --interval=5s --timeout=3s --start-period=15m --retries=3 CMD ["python", "deploy/healthcheck.py"]
ENTRYPOINT ["python", "-m", "server"]
