# The server for a CPU or an NVIDIA GPU. The packages bring CUDA, the host has the driver (580 or newer).
#
#   docker build -t sana-sprint-server:cpu .
#   docker build -t sana-sprint-server:gpu --build-arg FLAVOUR=gpu .      server cards: H100, H200, L4, A100, ...
#   docker build -t sana-sprint-server:rtx --build-arg FLAVOUR=rtx .      GeForce RTX: TensorRT for RTX
#   docker build -t sana-sprint-server:ray --build-arg FLAVOUR=ray .      gpu and Ray Serve
#
# TensorRT's package (gpu, ray) downloads its libraries from NVIDIA's own index; NVIDIA_INDEX names another index with
# them. All other packages come from the default index. PIP_EXTRA_INDEX_URL can name an index with CPU wheels of torch,
# which are ten times smaller than the default index's CUDA wheels, and PIP_FIND_LINKS a folder of wheels.
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
# Layers in order of change: base, packages, code. The image's environment has no pip.
RUN python3 -m venv /pip \
 && /pip/bin/python -m pip --python /venv/bin/python install --no-cache-dir --no-compile \
    ${NVIDIA_INDEX:+--extra-index-url "${NVIDIA_INDEX}"} --requirement "/requirements-${FLAVOUR}.lock"
# Removes files that no server loads: headers, static libraries, profilers, unreferenced libraries, Windows builders.
RUN cd /venv/lib/python3*/site-packages \
 && rm -rf nvidia/*/include nvidia/nvshmem/lib/*device* nvidia/cu13/lib/libcusolverMg.so* nvidia/cu13/lib/libnvperf_* \
    nvidia/cu13/lib/*.alt.so* nvidia/cu13/lib/libnvblas.so* nvidia/cu13/lib/libcufftw.so* \
    torch/include torch/bin/protoc* torch/share triton/backends/nvidia/lib/cupti triton/_C/libproton.so pulp/solverdir \
    tensorrt_libs/*_win.so* \
 && find . -name '*.a' -delete

# What needs a C compiler, which the image itself does not have: our kernels for a CPU, and what Triton and builds of
# engines need. Debian's own Python has its headers in another package.
FROM packages AS compiled
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends gcc libc6-dev \
    $([ -e "$(/venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h" ] \
      || echo python3-dev)
WORKDIR /app
COPY engines engines
RUN mkdir -p engines/kernels/compiled \
 && /venv/bin/python -m engines.kernels.launch_code \
 && /venv/bin/python -m engines.backends.cpu.kernels.library

FROM ${BASE}
COPY --from=packages /venv /venv
WORKDIR /app
COPY LICENSE build_engine.py ./
COPY engines engines
COPY --from=compiled /app/engines/kernels/compiled engines/kernels/compiled
COPY --from=compiled /app/engines/backends/cpu/kernels/compiled engines/backends/cpu/kernels/compiled
COPY server server
COPY models models
COPY deploy/healthcheck.py deploy/bytecode.py deploy/
# Python keeps the bytecode of every module that the server imports: a container with a read-only root cannot.
# One user without name or shell, two folders for volumes; the rest may be read-only.
RUN /venv/bin/python -m compileall -q engines server \
 && PYTHONPATH=. /venv/bin/python deploy/bytecode.py \
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
