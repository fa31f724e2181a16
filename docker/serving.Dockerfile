# What `make serve` runs in with ENGINE=tensorrt: the packages of the endpoint and of the text models, which NVIDIA's
# image lacks, in a second virtual environment. Nothing in the image is replaced: only Python started from /opt/bake
# sees our packages, and it sees the image's (numpy, tensorrt_llm) after them. base.pth says where those are if the
# image's own Python is a virtual environment, because a new one that is made from it would see the system's packages
# instead (26.07). This is a separate file, because docker's classic builder runs every stage of a file, wanted or not.
ARG BASE
# hadolint ignore=DL3006
FROM ${BASE} AS serving
COPY openai*.txt /tmp/bake/
RUN lock=/tmp/bake/openai-$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt \
 && if [ ! -e "$lock" ]; then lock=/tmp/bake/openai.txt; fi \
 && python3 -m venv --without-pip --symlinks --system-site-packages /opt/bake \
 && site=$(/opt/bake/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
 && python3 -c 'import site, sys; print(*(f"import site; site.addsitedir({p!r})" for p in site.getsitepackages()), sep="\n")' \
      > "$site/base.pth" \
 && python3 -m pip install --no-cache-dir --no-deps --require-hashes --only-binary :all: --target "$site" \
      --requirement "$lock" \
 && /opt/bake/bin/python -c 'import importlib.metadata as m, numpy, tritonclient.grpc.aio; print(m.version("tensorrt_llm"))'
ENV PATH=/opt/bake/bin:$PATH
