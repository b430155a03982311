#!/usr/bin/env bash
# The containers for real: builds the images, starts docker/compose.yaml on a Docker engine of its own, has jobs answered
# while a worker is drained, and takes everything down. Needs root on Debian; `make containers` runs it.
# Without a registry in reach, tests/containers/stand_in.sh makes the images that ours are built on.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$PWD/.venv/bin/python here=$PWD/tests/containers

skip() {
  echo "containers: skipped: $1"
  exit 0
}
step() { echo "containers: $1 (${SECONDS} s)"; }

[ "$(id -u)" = 0 ] || skip "only root can start a Docker engine"
for tool in dockerd docker iptables openssl; do command -v $tool >/dev/null || skip "no $tool (Debian: docker.io docker-cli iptables openssl)"; done
docker buildx version >/dev/null 2>&1 || skip "no docker buildx (Debian: docker-buildx)"
docker compose version >/dev/null 2>&1 || skip "no docker compose (Debian: docker-compose)"

work=$(mktemp -d)
export DOCKER_HOST=unix://$work/sock
dockerd --data-root "$work/data" --exec-root "$work/exec" --pidfile "$work/dockerd.pid" -H "$DOCKER_HOST" >"$work/dockerd.log" 2>&1 </dev/null &
daemon=$!
compose=(docker compose --env-file "$work/env" --file docker/compose.yaml)

finish() {
  status=$?
  trap - EXIT
  if [ $status != 0 ]; then "${compose[@]}" logs --tail 20 2>/dev/null || tail -5 "$work/dockerd.log"; fi
  "${compose[@]}" down --volumes --timeout 20 >/dev/null 2>&1 || true
  kill "$daemon" 2>/dev/null || true
  wait "$daemon" 2>/dev/null || true
  { grep -o " $work[^ ]*" /proc/mounts || true; } | sort -r | while read -r place; do umount "$place" || true; done
  rm -rf "$work" || true
  exit $status
}
trap finish EXIT
trap 'exit 130' INT TERM

for _ in $(seq 100); do
  docker info >/dev/null 2>&1 && break
  kill -0 "$daemon" 2>/dev/null || skip "no Docker engine can run here: $(tail -1 "$work/dockerd.log")"
  sleep 0.3
done
docker info >/dev/null 2>&1 || skip "the Docker engine does not answer: $(tail -1 "$work/dockerd.log")"

# What pip is told on this machine reaches the builds as secrets; wheels that lie on its disk do not.
"$python" - "$work/pip.conf" <<'PY'
import subprocess, sys
told = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
names = {"index-url", "extra-index-url", "trusted-host", "default-timeout", "timeout", "proxy"}
pairs = [line.split("=", 1) for line in told.splitlines() if "=" in line]
wanted = {name.rsplit(".", 1)[-1]: value.strip("'") for name, value in pairs if name.rsplit(".", 1)[-1] in names}
lines = ["[global]", "cert = /run/secrets/authorities", *(f"{name} = {value}" for name, value in wanted.items())]
open(sys.argv[1], "w").write("\n".join(lines) + "\n")
PY

free_port() { "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
port=$(free_port)
mkdir "$work/keys"
cat >"$work/env" <<ENV
VALKEY_PASSWORD=$(openssl rand -hex 32)
TAXIWAY_SECRET=$(openssl rand -hex 32)
FLOWER_VALKEY_PASSWORD=$(openssl rand -hex 32)
TUNER_VALKEY_PASSWORD=$(openssl rand -hex 32)
FLOWER_BASIC_AUTH=operator:secret
CPU_WORKERS=2
PIP_CONFIG=$work/pip.conf
AUTHORITIES=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}
KEYS_FOLDER=$work/keys
QUEUES=$here/queues.yaml
ROUTER_PORT=$port
FLOWER_PORT=$(free_port)
ENV

base=$(sed -n 's/^ARG PYTHON_IMAGE=//p' docker/router.Dockerfile)
if ! timeout 60 docker pull --quiet "$base" >/dev/null 2>&1; then
  command -v mmdebstrap >/dev/null || skip "no registry in reach, and no mmdebstrap to make a base image (Debian: mmdebstrap)"
  bash "$here/stand_in.sh" "$python" taxiway-stand-in >/dev/null
  printf '%s_IMAGE=taxiway-stand-in\n' PYTHON VALKEY NGINX >>"$work/env"
  step "no registry in reach: made a stand-in for the images of others"
fi

"${compose[@]}" build --quiet router worker-cpu flower
"${compose[@]}" --profile tpu build --quiet worker-tpu
image=$(sed -n 's/^PYTHON_IMAGE=//p' "$work/env")
docker build --quiet --file docker/controller.Dockerfile --tag taxiway/controller --build-arg "PYTHON_IMAGE=${image:-$base}" \
  --secret "id=pip,src=$work/pip.conf" --secret "id=authorities,src=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}" . >/dev/null
step "built the images of router, worker-cpu, worker-tpu, flower and controller; worker-cuda is left out: 3 GB of wheels"

docker run --rm --user 0 --volume "$work/keys:/keys" --entrypoint python taxiway/router -m api.keys_file new \
  --file /keys/keys.jsonl --tenant ci --scope admin --scope submit --scope read >"$work/key" 2>/dev/null
chmod 755 "$work" "$work/keys" && chmod 644 "$work/keys/keys.jsonl"
"${compose[@]}" up --detach --no-build --wait --wait-timeout 180 >/dev/null 2>&1
step "every service is healthy"

TAXIWAY_KEY=$(cat "$work/key") "$python" "$here/drill.py" "http://127.0.0.1:$port" 90 >"$work/drill" &
drill=$!
until [ -s "$work/drill" ]; do kill -0 $drill && sleep 0.2; done
docker stop --time 120 taxiway-worker-cpu-2 >/dev/null
[ "$(docker inspect --format '{{.State.ExitCode}}' taxiway-worker-cpu-2)" = 0 ]
wait $drill
cat "$work/drill"
step "a worker was drained while jobs ran, and every job was answered"
