#!/usr/bin/env bash
# For machines without a registry alone: one image that stands in for those that docker/ takes from Docker Hub. It is
# Debian's minimal system of this machine's release with Valkey and nginx, and this machine's CPython in /usr/local.
#   stand_in.sh PYTHON TAG
set -euo pipefail
python=$1 tag=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

prefix=$("$python" -c 'import sys; print(sys.base_prefix)')
version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
mkdir "$work/python"
shared=$(cd "$prefix" && find lib -maxdepth 1 -name 'libpython3*.so*')
tar -C "$prefix" --exclude="lib/$version/site-packages" --exclude="lib/$version/test" --exclude=__pycache__ --exclude='*.a' --exclude='_tkinter*' \
  -cf - "bin/$version" "lib/$version" $shared | tar -C "$work/python" -xf -

# The packages whose libraries this CPython is linked to.
libraries=$(find "$work/python" -name '*.so*' -o -path "*/bin/$version" | xargs ldd 2>/dev/null | awk '$2 == "=>" && $3 ~ "^/" {print $3}' | sort -u)
packages=$(for library in $libraries; do dpkg -S "$(realpath "$library")" 2>/dev/null || true; done | cut -d: -f1 | sort -u | paste -sd,)
suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
mirror=$({ cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null || true; } | grep -oE 'https?://[^ ]*debian/?( |$)' | head -1 | tr -d ' ')
mmdebstrap --quiet --variant=minbase --include="ca-certificates,valkey-server,valkey-tools,nginx-light,$packages" \
  --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
  --customize-hook='rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*' "$suite" "$work/system.tar" "$mirror"

cat >"$work/nginx.conf" <<'CONF'
pid /tmp/nginx.pid;
error_log /dev/stderr;
events {}
http {
  access_log /dev/stdout;
  client_body_temp_path /tmp/body;
  proxy_temp_path /tmp/proxy;
  fastcgi_temp_path /tmp/fastcgi;
  uwsgi_temp_path /tmp/uwsgi;
  scgi_temp_path /tmp/scgi;
  include /etc/nginx/conf.d/*.conf;
}
CONF
cat >"$work/Dockerfile" <<FILE
FROM scratch
ADD system.tar /
COPY python /usr/local
COPY nginx.conf /etc/nginx/nginx.conf
RUN ldconfig && ln -s $version /usr/local/bin/python3 && ln -s $version /usr/local/bin/python \\
 && mkdir -p /usr/local/lib/$version/site-packages /data && chown valkey:valkey /data \\
 && python -m ensurepip >/dev/null && python -c 'import ssl, sqlite3, bz2, lzma, ctypes, uuid'
WORKDIR /data
VOLUME /data
CMD ["nginx", "-g", "daemon off;"]
FILE
docker build --quiet --tag "$tag" "$work"
