# shellcheck shell=bash disable=SC2154
# Puts husk into containerd's configuration and takes it out again; sourced by install and uninstall, which set `destdir`.
#
# containerd 2 merges drop-ins into what the main file says. containerd 1 does not: a drop-in's section of the CRI plugin replaces the
# whole section (containerd issues 5837 and 7982), the user's settings and runc with it. So husk is a drop-in where that is safe, else
# a marked block at the end of the main file. Either way containerd itself is asked what the result means (`containerd config dump`):
# nothing may have changed but that husk is there; if it has, nothing is written.

main_file=$destdir/etc/containerd/config.toml
drop_in=$destdir/etc/containerd/conf.d/husk.toml
begin='# BEGIN husk: written by deploy/install, removed by deploy/uninstall'
end='# END husk'
own_main='# Written by husk'"'"'s deploy/install; deploy/uninstall removes this file while it is as it was written.'

# The name of the plugin that holds the runtimes, in version $1 of the configuration.
plugin() { if [ "$1" = 3 ]; then echo io.containerd.cri.v1.runtime; else echo io.containerd.grpc.v1.cri; fi; }

# husk's table, for version $1.
runtime_table() {
    cat <<TOML
[plugins."$(plugin "$1")".containerd.runtimes.husk]
  runtime_type = "io.containerd.husk.v2"
  # What a pod may ask of its VM; the shim takes a closed list of these.
  pod_annotations = ["io.husk.*"]
  # A privileged container is privileged in its VM: the host's devices are not handed in.
  privileged_without_host_devices = true
TOML
}

# The file $1 without husk's block.
without_block() { sed "\\|^$begin\$|,\\|^$end\$|d" "$1"; }

# The version that the file $1 declares; 1 if none.
declared_version() { sed -nE 's/^[[:space:]]*version[[:space:]]*=[[:space:]]*([0-9]+).*/\1/p' "$1" | head -n 1 | grep . || echo 1; }

# Whether the file $1 imports the folder of drop-ins.
imports_drop_ins() { sed -n '/^[[:space:]]*imports[[:space:]]*=/,/\]/p' "$1" | grep -qF '/etc/containerd/conf.d/'; }

# What containerd makes of the file $1 (none: of no file).
meaning() { if [ -n "$1" ]; then containerd -c "$1" config dump; else containerd config default; fi 2> /dev/null | grep -v '^imports' || true; }

# Whether the meaning in the file $2 has all that the one in $1 has, and husk.
only_adds() {
    local status=0
    diff "$1" "$2" > "$2.diff" || status=$?
    [ $status -le 1 ] && [ -s "$1" ] && ! grep -q '^<' "$2.diff" && grep -q 'io\.containerd\.husk\.v2' "$2"
}

# The table of runc, with those below it, from the meaning in the file $1, for version $2: containerd 1 has runc by default only where no runtime is named.
runc_table() {
    awk '/^ *\[/ { on = /containerd\.runtimes\.runc[].]/ } on' "$1" |
        sed -E "s/'?\"?io\.containerd\.(grpc\.v1\.cri|cri\.v1\.runtime)\"?'?/\"$(plugin "$2")\"/"
}

# Writes $1 from standard input, all or nothing.
replace() {
    mkdir -p "$(dirname "$1")"
    cat > "$1.husk-new"
    if [ -e "$1" ]; then chmod --reference="$1" "$1.husk-new"; chown --reference="$1" "$1.husk-new"; fi
    mv -f "$1.husk-new" "$1"
}

# Adds husk for containerd of major version $1.
add_to_containerd() {
    local work version candidate
    work=$(mktemp -d); candidate=$work/config.toml
    if [ -e "$main_file" ] && without_block "$main_file" | grep -q 'io\.containerd\.husk\.v2'; then
        echo "containerd: $main_file names husk already; left alone"
        rm -rf "$work"; return
    fi
    if [ "$1" -ge 2 ] && { ! [ -e "$main_file" ] || imports_drop_ins "$main_file"; }; then
        { echo "# husk, a runtime that runs each pod in a VM of its own. Written by deploy/install."; echo "version = 3"; echo; runtime_table 3; } | replace "$drop_in"
        [ -e "$main_file" ] || printf '%s\nversion = 3\nimports = ["/etc/containerd/conf.d/*.toml"]\n' "$own_main" | replace "$main_file"
        echo "containerd: wrote $drop_in"
        rm -rf "$work"; return
    fi
    if [ -e "$main_file" ]; then
        without_block "$main_file" > "$candidate"
        meaning "$candidate" > "$work/before"
    else
        printf '%s\nversion = 2\n' "$own_main" > "$candidate"
        meaning '' > "$work/before"
    fi
    version=$(declared_version "$candidate")
    if [ "$version" = 1 ]; then
        echo "containerd: $main_file is of version 1. Convert it (containerd config migrate), then run this again" >&2
        rm -rf "$work"; return 1
    fi
    if ! [ -s "$work/before" ]; then
        echo "containerd: it can't read $main_file ('containerd config dump' says why); mend it, then run this again" >&2
        rm -rf "$work"; return 1
    fi
    # With an end to its last line.
    # shellcheck disable=SC1003
    sed '$a\' "$candidate" > "$work/base"
    { cat "$work/base"; echo "$begin"; runtime_table "$version"; echo "$end"; } > "$candidate"
    meaning "$candidate" > "$work/after"
    if ! only_adds "$work/before" "$work/after"; then
        { cat "$work/base"; echo "$begin"; runtime_table "$version"; runc_table "$work/before" "$version"; echo "$end"; } > "$candidate"
        meaning "$candidate" > "$work/after"
    fi
    if ! only_adds "$work/before" "$work/after"; then
        echo "containerd: adding husk to $main_file would change more than that, so it was left alone. Add by hand:" >&2
        runtime_table "$version" >&2
        rm -rf "$work"; return 1
    fi
    if [ -e "$main_file" ] && cmp -s "$candidate" "$main_file"; then
        echo "containerd: $main_file has husk already"
    else
        replace "$main_file" < "$candidate"
        echo "containerd: added husk to $main_file"
    fi
    rm -rf "$work"
}

# Takes husk out again.
remove_from_containerd() {
    if [ -e "$drop_in" ]; then rm -f "$drop_in"; rmdir --ignore-fail-on-non-empty "$(dirname "$drop_in")"; echo "containerd: removed $drop_in"; fi
    [ -e "$main_file" ] || return 0
    if grep -qxF "$begin" "$main_file"; then
        without_block "$main_file" | replace "$main_file"
        echo "containerd: took husk out of $main_file"
    fi
    # Ours, and nothing else in it.
    if [ "$(head -n 1 "$main_file")" = "$own_main" ] && ! sed 1d "$main_file" | grep -qvE '^(version = [23]|imports = \["/etc/containerd/conf\.d/\*\.toml"\])$'; then
        rm -f "$main_file"
        echo "containerd: removed $main_file"
    fi
}
