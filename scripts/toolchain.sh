#!/usr/bin/env bash
# What make asks docker with ENGINE=tensorrt, on the host. scripts/making decides.
# toolchain.sh versions                  the TensorRT-LLM versions of docker/toolchains.json
# toolchain.sh cell VERSION NAME         one cell of the table
# toolchain.sh image VERSION             NVIDIA's image: by digest once `make pin` has written it, before that by tag
# toolchain.sh check IMAGE [gpu]         report what is missing before anything starts
# toolchain.sh free HOST PORT...         report a port on which a program listens
# toolchain.sh pin                       ask the registry for the digest of every tag and write it into the table
set -euo pipefail
table=docker/toolchains.json

report() { # title, what was seen, what to do, command
    printf '\n-- %s ----------------------------------------\n\n%s\n\n%s\n\n    %s\n\n' \
        "$1" "${2%$'\n'}" "$3" "${4//$'\n'/$'\n'    }" >&2
    exit 1
}

# The user's command with changes: typed serve TP=2. Like make in scripts/reports/problem.py, with the user's own word.
typed() {
    local goal=${BAKE_GOAL:-$1} settings=${BAKE_SETTINGS:-} line name words
    shift
    words="make $goal"
    while IFS= read -r line; do
        line=${line# }
        name=${line%%=*}
        [[ $line == *=* && " $* " != *" $name="* ]] && words+=" $name=$(quoted "${line#*=}")"
    done <<<"$settings"
    for line in "$@"; do words+=" ${line%%=*}=$(quoted "${line#*=}")"; done
    echo "$words"
}

quoted() { if [[ $1 =~ ^[A-Za-z0-9_./:@%+,-]*$ ]]; then printf %s "$1"; else printf "'%s'" "$1"; fi; }

versions() { sed -n 's/^    "\([^"]*\)": {.*/\1/p' "$table"; }

# A row is one line, and its nested cells come last: the first hit is the cell itself.
cell() { # version, name; null is empty
    local row
    row=$(grep -F "    \"$1\": {" "$table") || report "NO TOOLCHAIN $1" \
        "TOOLCHAIN is $1; $table has $(versions | paste -sd' ')." "Take one of these:" "$(typed serve TOOLCHAIN=)"
    if [[ $row =~ \"$2\":\ (\"([^\"]*)\"|\[([^]]*)\]|([^,}]+)) ]]; then
        local value=${BASH_REMATCH[2]}${BASH_REMATCH[3]}${BASH_REMATCH[4]}
        [ "$value" = null ] || tr -d '",' <<<"$value"
    fi
}

# --- docker ---

image() {
    local tag digest
    tag=$(cell "$1" image) digest=$(cell "$1" digest)
    if [ -n "$digest" ]; then echo "${tag%:*}@$digest"; else echo "$tag"; fi
}

check() { # image, gpu or nothing
    local seen
    type -P docker >/dev/null || report "NO DOCKER" \
        "ENGINE=tensorrt builds and serves in NVIDIA's container; there is no docker on PATH." \
        "Install docker and NVIDIA's container toolkit (https://docs.nvidia.com/datacenter/cloud-native/container-toolkit), then:" "$(typed serve)"
    seen=$(docker info --format '{{range $name, $runtime := .Runtimes}}{{$name}} {{end}}' 2>&1) || report "DOCKER DOES NOT ANSWER" \
        "docker says: $seen" "It is not running, or $(id -un) may not use it. Fix that and look:" \
        "sudo systemctl start docker; sudo usermod -aG docker $(id -un)   # then log in again"$'\n'"docker info"
    if [ "${2:-}" = gpu ] && [[ " $seen " != *" nvidia "* ]] && ! type -P nvidia-container-runtime-hook nvidia-container-cli nvidia-ctk >/dev/null; then
        report "DOCKER HAS NO NVIDIA RUNTIME" \
            "docker's runtimes are: $seen; NVIDIA's is not among them, and no nvidia-container-cli is on PATH. Without it a container sees no GPU." \
            "Install NVIDIA's container toolkit, and register it:" \
            "sudo apt-get install nvidia-container-toolkit && sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
    fi
    docker image inspect --format '{{.Id}}' "$1" >/dev/null 2>&1 && return
    if [[ $1 == sha256:* ]]; then
        report "THE TOOLCHAIN IMAGE IS GONE" "build/ says that it is $1; docker has no such image." \
            "Make it again:" "rm build/*.iid && $(typed serve)"
    fi
    seen=$(for version in $(versions); do if [ "$(image "$version")" = "$1" ]; then cell "$version" image_gb; fi; done)
    report "NVIDIA'S IMAGE IS NOT HERE" "docker has no $1 yet. It is large: ${seen:-more than 20} GB; so it is fetched only when you say so." \
        "Fetch it (no account is needed), and go on:" "docker pull $1 && $(typed serve)"
}

free() { # address, ports
    local host=$1 port
    shift
    case $host in 0.0.0.0) host=127.0.0.1 ;; ::) host=::1 ;; esac
    for port in "$@"; do
        if (exec 3<>"/dev/tcp/$host/$port") 2>/dev/null; then
            report "PORT $port CANNOT BE USED" "Something listens on $host:$port already. Nothing was loaded." \
                "See what it is, and end it or take another port:" "ss -ltnp 'sport = :$port'"
        fi
    done
}

# --- pins ---

digest_of() { # tag
    docker buildx imagetools inspect "$1" --format '{{.Manifest.Digest}}' 2>&1 \
        || docker image inspect --format '{{index .RepoDigests 0}}' "$1" 2>&1 | sed 's/.*@//'
}

pin() {
    local version tag old new failed=''
    type -P docker >/dev/null || report "NO DOCKER" "docker asks the registry for the digests; it is not on PATH." \
        "On a machine with docker and network, type:" "make pin"
    for version in $(versions); do
        tag=$(cell "$version" image) old=$(cell "$version" digest)
        new=$(digest_of "$tag") || true
        if [[ ${new##*$'\n'} =~ ^sha256:[0-9a-f]{64}$ ]]; then
            new=${new##*$'\n'}
            printf 'pin         %-7s %s: %s -> %s\n' "$version" "$tag" "${old:-not pinned}" "$new"
            sed "s|^\(    \"$version\": {.*\"digest\": \)[^,]*|\1\"$new\"|" "$table" >"$table.writing"
            if cmp -s "$table.writing" "$table"; then rm "$table.writing"; else mv "$table.writing" "$table"; fi
        else
            failed+="  $tag: $(tail -n 1 <<<"$new")"$'\n'
        fi
    done
    [ -z "$failed" ] || report "NOT EVERY TAG COULD BE PINNED" "No digest for:"$'\n\n'"$failed" \
        "Is the registry within reach, and does it still have the tag? What was pinned is in $table. Look:" \
        "docker buildx imagetools inspect $(sed -n '1s/^ *\([^ ]*\): .*/\1/p' <<<"$failed")"
}

"$@"
