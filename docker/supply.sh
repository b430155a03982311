#!/usr/bin/env bash
# What the images are made of: supply.sh lock | engines | bases | audit | sbom (`make lock`, and so on).
#
# lock      docker/requirements/IMAGE.txt: every package that an image installs (the group image-IMAGE of
#           pyproject.toml), at one version, each of its files by its SHA-256, so that an image installs nothing else
# engines   vLLM's newest release, in the chart's engines: its images have PyPI's versions as tags
# bases     the digest that each image of another project has behind its tag: in Dockerfiles, Compose and the chart
# audit     known vulnerabilities of the locked versions; fails for any, and passes where the service cannot be reached
# sbom      build/sbom/IMAGE.json: what each image holds, as CycloneDX
set -euo pipefail
cd "$(dirname "$0")/.."

images=$(basename --suffix=.Dockerfile --multiple docker/*.Dockerfile)
uv=${UV:-.venv/bin/uv}

case ${1:-} in
lock)
  for image in $images; do
    # from 3.11.3 on redis-py needs a package less; 2.36 is the C library of the images' Debian
    "$uv" pip compile pyproject.toml --group "image-$image" --upgrade --quiet --generate-hashes --no-annotate --no-header \
      --python-version 3.11.3 --python-platform x86_64-manylinux_2_36 --output-file "docker/requirements/$image.txt"
    echo "wrote docker/requirements/$image.txt"
  done
  ;;
engines)
  version=$("$uv" pip compile --quiet --no-deps --no-header --no-annotate - <<<vllm)
  sed -i -E "s#(vllm/vllm-openai:v)[0-9A-Za-z.]+#\1${version#*==}#" charts/taxiway/files/engines.yaml
  echo "vLLM ${version#*==}"
  ;;
bases)
  places=(docker/*.Dockerfile docker/compose.yaml charts/taxiway/values.yaml)
  for image in $(grep -ohE '[A-Za-z0-9./_-]+:[A-Za-z0-9._-]+@sha256:[0-9a-f]{64}' "${places[@]}" | sed 's/@.*//' | sort -u); do
    digest=$(docker buildx imagetools inspect "$image" --format '{{json .Manifest.Digest}}' | tr -d '"')
    sed -i -E "s#(^|[^A-Za-z0-9./_-])$image@sha256:[0-9a-f]{64}#\1$image@$digest#" "${places[@]}"
    echo "$image@$digest"
  done
  ;;
audit)
  found=0
  for image in $images; do
    if known=$("$uv" tool run pip-audit==2.10.1 --require-hashes --disable-pip -r "docker/requirements/$image.txt"); then
      echo "$image: no known vulnerability${known:+, but not all packages audited}"
    elif [ -n "$known" ]; then
      printf '%s:\n%s\n' "$image" "$known"
      found=1
    else
      echo "$image: not audited: the advisory service cannot be reached"
    fi
  done
  exit $found
  ;;
sbom)
  mkdir -p build/sbom
  for image in $images; do
    "$uv" tool run --from cyclonedx-bom==7.5.0 cyclonedx-py requirements "docker/requirements/$image.txt" \
      --output-reproducible --output-format JSON --output-file "build/sbom/$image.json"
    echo "wrote build/sbom/$image.json"
  done
  ;;
*)
  sed -n '2,9s/^# \?//p' "$0" >&2
  exit 2
  ;;
esac
