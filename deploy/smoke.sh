#!/usr/bin/env bash
# Brings the compose file up, sends one fault through it, looks for its trace, takes it down.
#
#   deploy/smoke.sh                                    with a network: builds in the image, real Jaeger
#   BUILD_TARGET=prebuilt JAEGER_IMAGE=tdx-mmu-jaeger-stand-in:local deploy/smoke.sh
#                                                      after deploy/offline-images.sh, without one
#
# COMPOSE="docker compose"   which compose (default: docker-compose, else docker compose)
# SMOKE_TLS=1                with TLS: deploy/docker-compose.tls.yml on top
# SMOKE_KEEP=1               leaves everything running
# SMOKE_REQUIRE_JAEGER=1     fails when no Jaeger answers, instead of saying so
# Ports and images: the variables of deploy/docker-compose.yml.
set -euo pipefail
exec </dev/null
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# A project of its own: a stack that somebody runs from this folder is neither used nor stopped.
export COMPOSE_FILE=deploy/docker-compose.yml COMPOSE_PROJECT_NAME=${SMOKE_PROJECT:-tdx-mmu-smoke}
if [[ -n ${SMOKE_TLS:-} ]]; then
    COMPOSE_FILE+=:deploy/docker-compose.tls.yml
fi
jaeger=http://127.0.0.1:${JAEGER_UI_PORT:-16686}
services=(tdx-module-svc mmu-service)
# The client is a process of its own, and the root of the trace.
traced=("${services[@]}" mmuctl)

if [[ -n ${COMPOSE:-} ]]; then
    read -ra compose <<<"$COMPOSE"
elif command -v docker-compose >/dev/null; then
    compose=(docker-compose)
else
    compose=(docker compose)
fi

say() { printf '==> [%3ds] %s\n' "$SECONDS" "$*"; }
die() {
    printf 'smoke: %s\n' "$*" >&2
    exit 1
}

finish() {
    local code=$?
    if ((code)); then
        "${compose[@]}" ps || true
        "${compose[@]}" logs --tail=40 || true
    fi
    if [[ -z ${SMOKE_KEEP:-} ]]; then
        "${compose[@]}" down --volumes --timeout 5 >/dev/null 2>&1 || true
    fi
    ((code == 0)) || echo "smoke: FAILED" >&2
}
trap finish EXIT

# poll SECONDS WHAT COMMAND...: until the command succeeds.
poll() {
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@"; do
        ((SECONDS < deadline)) || return 1
        sleep 0.5
    done
    say "$what"
}
is_healthy() {
    local id
    id=$("${compose[@]}" ps -q "$1" 2>/dev/null)
    [[ -n $id && $(docker inspect --format '{{.State.Health.Status}}' "$id") == healthy ]]
}
get() {
    if command -v curl >/dev/null; then
        curl --silent --fail --max-time 5 "$1"
    else
        wget --quiet --timeout=5 --tries=1 --output-document=- "$1"
    fi
}
client() { "${compose[@]}" run --rm -T client --output json "$@"; }
# field NAME JSON: the plain value of that key (the last one of several), without its quotes.
field() { tr -d '\n\r' <<<"$2" | sed -n "s/.*\"$1\" *: *\"\{0,1\}\([^\",} ]*\).*/\1/p"; }

if [[ ${BUILD_TARGET:-app} == prebuilt ]]; then
    for program in "${services[@]}" mmuctl; do
        [[ -x ${PREBUILT_DIR:-target/release}/$program ]] ||
            die "${PREBUILT_DIR:-target/release}/$program is not there: build it first"
    done
fi
say "up (compose: ${compose[*]}, target: ${BUILD_TARGET:-app})"
"${compose[@]}" up -d --build
for service in "${services[@]}"; do
    poll 60 "$service is healthy" is_healthy "$service" || die "$service does not get healthy"
done

say "one TD with 64 MiB of private memory, one fault"
created=$(client vm create --label smoke)
vm=$(field vm_id "$created")
[[ -n $vm ]] || die "vm create told no vm_id: $created"
client vcpu add --vm "$vm" >/dev/null
client slot set --vm "$vm" --gpa 0 --size 64M >/dev/null
client convert --vm "$vm" --gpa 0 --size 64M --to private >/dev/null
client vm finalize "$vm" >/dev/null
fault=$(client fault --vm "$vm" --gpa 0x100000 --write)
echo "$fault"
[[ $(field ret_pf "$fault" | tr '[:upper:]' '[:lower:]') == *fixed ]] || die "the fault was not fixed"
grep -q 'TDH\.MEM\.PAGE\.AUG' <<<"$fault" || die "the fault did not reach TDH.MEM.PAGE.AUG"
trace=$(field trace_id "$fault")
audit=$(client audit --vm "$vm")
echo "$audit"
[[ $(field mismatches "$audit") == 0 ]] || die "the audit found mismatches"

if [[ -z ${SMOKE_TLS:-} ]]; then
    # What a browser and Prometheus get from the published port.
    mmu=http://127.0.0.1:${MMU_PORT:-50051}
    page=$(get "$mmu/") || die "no page on $mmu"
    grep -q '<title>TDX mirror MMU</title>' <<<"$page" || die "something else than the page is on $mmu"
    overview=$(get "$mmu/api/overview") || die "no overview on $mmu"
    grep -q "\"jaeger_url\":\"http://localhost:${JAEGER_UI_PORT:-16686}\"" <<<"$overview" ||
        die "the page links to another Jaeger: $overview"
    metrics=$(get "$mmu/metrics") || die "no metrics on $mmu/metrics"
    grep -q '^mmu_faults_total{.*} 1$' <<<"$metrics" || die "the metrics do not tell of the fault"
    say "the page and the metrics are on $mmu"
fi
client vm destroy "$vm" >/dev/null

if [[ -n ${SMOKE_TLS:-} ]]; then
    # The last word is not read as success: the call has to be refused, and for this reason.
    refused=$(CLIENT_CERT=operator client vm create 2>&1) && die "an operator made a VM"
    grep -q 'needs the role host' <<<"$refused" || die "an operator was refused otherwise: $refused"
    say "an operator may not make a VM"
fi

# The stable query API (v3); it answers in the shape of OTLP/JSON.
trace_has_every_process() {
    local spans service
    spans=$(get "$jaeger/api/v3/traces/$trace") || return 1
    for service in "${traced[@]}"; do
        grep -q "\"$service\"" <<<"$spans" || return 1
    done
    grep -q '"TDH\.MEM\.PAGE\.AUG"' <<<"$spans"
}
if get "$jaeger/api/v3/services" 2>/dev/null | grep -q '"services"'; then
    [[ -n $trace ]] || die "the fault told no trace_id"
    poll 30 "Jaeger has the trace with spans of ${traced[*]}: $jaeger/trace/$trace" \
        trace_has_every_process || die "Jaeger does not show trace $trace with spans of ${traced[*]}"
elif [[ -n ${SMOKE_REQUIRE_JAEGER:-} ]]; then
    die "no Jaeger answers on $jaeger"
else
    say "NOT CHECKED: no Jaeger answers on $jaeger, so nobody looked for trace ${trace:-(none)}"
fi

if [[ -z ${SMOKE_KEEP:-} ]]; then
    ids=$("${compose[@]}" ps -q "${services[@]}")
    "${compose[@]}" stop --timeout 10 >/dev/null 2>&1
    for id in $ids; do
        code=$(docker inspect --format '{{.State.ExitCode}}' "$id")
        [[ $code == 0 ]] || die "$(docker inspect --format '{{.Name}}' "$id") ended with exit code $code on SIGTERM"
    done
    say "both services ended with exit code 0 on SIGTERM"
fi
say "smoke: ok"
