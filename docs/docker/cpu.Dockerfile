# mlcm_rl on a CPU. In the folder of the clone, with the address of torch's CPU builds as its install page gives it:
#   docker build -f docs/docker/cpu.Dockerfile --build-arg TORCH_INDEX=... -t mlcm .
#   docker run --rm -v "$PWD:/data" -w /data -u "$(id -u):$(id -g)" mlcm run emoji_demo
# Not built by this project, which has no container engine; the wheel, and a user without a home folder, are tested.
FROM python:3.11-slim
ARG TORCH_INDEX
COPY . /source
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" -c /source/constraints.txt torch \
 && pip install --no-cache-dir -c /source/constraints.txt /source \
 && rm -rf /source
ENTRYPOINT ["mlcm"]
CMD ["doctor"]
