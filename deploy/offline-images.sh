#!/usr/bin/env bash
# Makes stand-ins for the images that deploy/Dockerfile and deploy/docker-compose.yml name, out of
# files of this host. For machines that can pull no image: a test of the very same Dockerfile and
# compose file, with programs that the host has built. Needs a docker engine; takes a second.
#
#   cargo build --release --locked && cargo build --release --locked -p trace-sink
#   deploy/offline-images.sh
#   BUILD_TARGET=prebuilt JAEGER_IMAGE=tdx-mmu-jaeger-stand-in:local docker-compose up -d --build
#
# runtime  takes the place of RUNTIME_IMAGE under the very same name: the host's C library, its CA
#          certificates, a user. An image of that name that is not a stand-in is left alone.
# jaeger   trace-sink of this project: receives OTLP on 4317 and answers the query API on 16686, so a
#          trace can be read back. Taken from PREBUILT_DIR (default: target/release).
set -euo pipefail
exec </dev/null

runtime_image=${RUNTIME_IMAGE:-gcr.io/distroless/cc-debian12:nonroot}
jaeger_image=${JAEGER_STAND_IN:-tdx-mmu-jaeger-stand-in:local}
mark=tdx-mmu.stand-in

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

label_of() { docker image inspect --format "{{index .Config.Labels \"$mark\"}}" "$1" 2>/dev/null; }

# import NAME FOLDER CHANGE...: the folder as a one-layer image, unless a real one has the name.
import() {
    local name=$1 folder=$2 change options=()
    shift 2
    if docker image inspect "$name" >/dev/null 2>&1 && [[ -z $(label_of "$name") ]]; then
        echo "offline-images: $name is here already and is the real one: left as it is"
        return
    fi
    for change in "$@" "LABEL $mark=true"; do options+=(--change "$change"); done
    tar --create --owner=0 --group=0 --numeric-owner --directory "$folder" . |
        docker import "${options[@]}" - "$name" >/dev/null
    echo "offline-images: $name made from this host ($(du -sh "$folder" | cut -f1))"
}

# The loader's path is part of every program, so it is asked of one; the rest lies where it says.
shared_objects() {
    ldd "$(command -v ls)" | grep -o '/[^ ]*ld-linux[^ ]*' | head -n 1
    local name
    for name in libc.so.6 libm.so.6 libgcc_s.so.1 libresolv.so.2 libdl.so.2 libpthread.so.0 \
        librt.so.1 libnss_dns.so.2 libnss_files.so.2; do
        ldconfig -p | awk -v name="$name" -v bits="$(getconf LONG_BIT)" '
            $1 == name && (bits == 32 || /x86-64|AArch64|64bit/) { print $NF; exit }'
    done
}

# A root folder with the C library, CA certificates and a user: what a static or dynamic program of
# this host needs to run.
make_root() {
    local root=$1 object
    mkdir -p "$root"/{etc/ssl/certs,home/nonroot,tmp}
    chmod 1777 "$root/tmp"
    chmod 0777 "$root/home/nonroot" # owned by root in the archive
    while read -r object; do
        # Contents, not links: the host may have merged /lib and /usr/lib, the image has not.
        mkdir -p "$root$(dirname "$object")"
        cp --dereference "$object" "$root$object"
    done < <(shared_objects)
    if [[ -r /etc/ssl/certs/ca-certificates.crt ]]; then
        cp --dereference /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
    fi
    printf 'root:x:0:0:root:/root:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/home/nonroot:/sbin/nologin\n' >"$root/etc/passwd"
    printf 'root:x:0:\nnonroot:x:65532:\n' >"$root/etc/group"
    printf 'passwd: files\ngroup: files\nhosts: files dns\n' >"$root/etc/nsswitch.conf"
}

make_runtime() {
    make_root "$work/runtime"
    import "$runtime_image" "$work/runtime" "USER 65532:65532" "WORKDIR /home/nonroot"
}

make_jaeger() {
    local root=$work/jaeger program=${PREBUILT_DIR:-target/release}/trace-sink
    if [[ ! -x $program ]]; then
        echo "offline-images: $program is not there: no stand-in for Jaeger" >&2
        return
    fi
    make_root "$root"
    cp "$program" "$root/trace-sink"
    import "$jaeger_image" "$root" "USER 65532:65532" "EXPOSE 4317 16686" 'CMD ["/trace-sink"]'
}

make_runtime
make_jaeger
