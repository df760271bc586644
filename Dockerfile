# A server in a container:
#
#   docker build -t splitfuse .
#   docker run --rm -p 8000:8000 -v splitfuse:/home/splitfuse/.cache splitfuse Qwen/Qwen2.5-0.5B-Instruct --quantization int8
#
# PyTorch as pip finds it by itself brings CUDA along. Its project has an index of builds for CPUs, a tenth of the size:
#   --build-arg PIP_EXTRA_INDEX_URL=...

FROM python:3.12-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++
COPY pyproject.toml setup.py README.md LICENSE /source/
COPY splitfuse /source/splitfuse
RUN SPLITFUSE_KERNELS=required pip wheel --no-deps --wheel-dir /wheels /source

FROM python:3.12-slim
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
ARG PIP_EXTRA_INDEX_URL
COPY --from=build /wheels /wheels
COPY constraints.txt /wheels/
RUN pip install --no-cache-dir --constraint /wheels/constraints.txt /wheels/*.whl
RUN useradd --create-home splitfuse && install --directory --owner splitfuse /home/splitfuse/.cache
USER splitfuse
VOLUME /home/splitfuse/.cache
EXPOSE 8000
# The list of deployments, by which the check finds port and TLS, is in /tmp: any user can write to it.
ENV XDG_RUNTIME_DIR=/tmp
HEALTHCHECK --start-period=60s CMD ["python", "-m", "splitfuse.deploy.health"]
# SIGTERM, which `docker stop` sends, drains; give it more time than --drain-timeout: docker stop --time 75.
ENTRYPOINT ["splitfuse", "serve", "--host", "0.0.0.0"]
