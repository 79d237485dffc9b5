# One image for the Ray head, the Ray workers and the Prefect worker, with or without GPUs: torch from the package
# index brings its own CUDA libraries, the NVIDIA container runtime brings the driver.
#
#   docker build -t deconv .
#   docker run --rm -v deconv:/home/deconv/.deconv deconv deconv run
#
# The patch release of Python is pinned because Ray refuses a driver whose Python differs from the cluster's.

# Only the names of the dependencies, so that the layer of gigabytes below is built anew only when they change.
FROM python:3.11.14-slim-bookworm AS requirements
COPY pyproject.toml /
RUN python -c 'import tomllib; print(*tomllib.load(open("/pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
    > /requirements.txt

FROM python:3.11.14-slim-bookworm AS dependencies
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
WORKDIR /build
COPY constraints.txt ./
COPY --from=requirements /requirements.txt ./
# Wheels only: nothing is compiled, so no compiler is needed in any stage.
RUN python -m venv --without-pip /opt/venv \
    && pip --python /opt/venv/bin/python install --only-binary :all: -c constraints.txt -r requirements.txt

FROM dependencies AS project
COPY LICENSE README.md pyproject.toml ./
COPY deconv_model deconv_model
COPY pipelines pipelines
# Beside the environment instead of into it, so that the code becomes a layer of its own.
RUN pip --python /opt/venv/bin/python install --no-deps --prefix /project .

FROM python:3.11.14-slim-bookworm
# KubeRay's probes call wget. KubeRay may start Ray from a login shell, which resets PATH: profile.d sets it again.
# Debian removes a superseded revision from its mirrors, so the versions are pinned up to it.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini=0.19.* wget=1.21.* \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 deconv \
    && useradd --uid 1000 --gid 1000 --create-home --shell /bin/bash deconv \
    && echo "PATH=/opt/venv/bin:\$PATH" > /etc/profile.d/deconv.sh \
    && install --directory --owner deconv --group deconv /home/deconv/.deconv
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=project /project /opt/venv
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_VISIBLE_DEVICES=all \
    PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1
# By number, so that Kubernetes can see that it is not root.
USER 1000:1000
WORKDIR /home/deconv
# tini reaps what ended workers leave behind and passes signals on.
ENTRYPOINT ["tini", "--"]
CMD ["deconv", "--help"]
