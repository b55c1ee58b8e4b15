# The guest kernel: its key in the cache, its configuration, its build. Sourced by `build`, which sets here, source and fail().

# Fails with the Debian packages of whatever the build needs and this machine lacks.
need_tools() {
    local packages=() pair
    for pair in make:make gcc:gcc ld:binutils flex:flex bison:bison bc:bc xz:xz-utils python3:python3 perl:perl; do
        command -v "${pair%%:*}" > /dev/null || packages+=("${pair##*:}")
    done
    echo '#include <libelf.h>' | gcc -E - > /dev/null 2>&1 || packages+=(libelf-dev)
    echo '#include <openssl/evp.h>' | gcc -E - > /dev/null 2>&1 || packages+=(libssl-dev)
    [ -f "$source" ] || [ "$source" != /usr/src/linux-source-6.12.tar.xz ] || packages+=(linux-source-6.12)
    [ ${#packages[@]} = 0 ] || fail "missing tools; on Debian or Ubuntu: apt-get install --no-install-recommends ${packages[*]}" \
        "(where there is no linux-source-6.12, give a kernel's tarball by --source)"
    [ -f "$source" ] || fail "no kernel source at $source"
}

# The fragments without their comments.
kernel_options() { grep -hE '^CONFIG_|^# CONFIG_[A-Z0-9_]+ is not set$' "$here"/kernel/*.config; }

# The hash of all that shapes the kernel: source, options, the way it is built, compiler and linker.
kernel_key() {
    {
        sha256sum < "$source"
        kernel_options
        declare -f kernel_build
        cat "$here/padding.py"
        gcc --version | head -1
        ld --version | head -1
    } | sha256sum | cut -c1-16
}

# Prints the path of the kernel in the cache; builds it first where it is absent. Only one build of a kernel runs at a time.
kernel_in_cache() {
    need_tools
    local cache=${HUSK_CACHE:-$HOME/.cache/husk}/guest-kernel key dir
    key=$(kernel_key)
    dir=$cache/$key
    if ! [ -e "$dir/vmlinux" ]; then
        mkdir -p "$cache"
        (
            flock -n 9 || { say "waiting for another build of this kernel"; flock 9; }
            # Whatever the end, the source tree goes (1.7 GB); the log of a failed build stays.
            trap 'rm -rf "$cache/$key.work/tree"' EXIT
            [ -e "$dir/vmlinux" ] || kernel_build "$dir" "$cache/$key.work"
        ) 9> "$cache/$key.lock" >&2
    fi
    echo "$dir/vmlinux"
}

# Every option asked for must be in the result: kconfig drops silently what lacks a dependency.
kernel_check_config() {
    local wanted missing=''
    while read -r wanted; do
        case $wanted in
            CONFIG_*=*) grep -qxF -- "$wanted" .config || missing+="  $wanted"$'\n' ;;
            '# CONFIG_'*' is not set')
                wanted=${wanted#\# }
                ! grep -q -- "^${wanted%% *}=" .config || missing+="  # $wanted"$'\n' ;;
        esac
    done < <(kernel_options)
    [ -z "$missing" ] || fail "the kernel's configuration does not have what was asked for (a dependency missing?):"$'\n'"$missing"
}

# kernel_build RESULT WORK: unpacks, configures, builds, strips; RESULT appears whole or not at all.
kernel_build() {
    local result=$1 work=$2 begun=$SECONDS jobs=${HUSK_JOBS:-$(nproc)} log
    log=$work/build.log
    rm -rf "$work"
    mkdir -p "$work/tree" "$work/out"
    say "kernel: unpacking $source"
    tar -xf "$source" -C "$work/tree" --strip-components=1
    cd "$work/tree"
    # Who, when and where would be in the kernel's version text; fixed, so that the same inputs give the same bytes.
    export KBUILD_BUILD_USER=husk KBUILD_BUILD_HOST=husk KBUILD_BUILD_TIMESTAMP='Thu Jan  1 00:00:00 UTC 1970' KBUILD_BUILD_VERSION=1
    export LC_ALL=C SOURCE_DATE_EPOCH=0
    say "kernel: configuring"
    make -s tinyconfig > "$log" 2>&1 || fail_with_log "make tinyconfig"
    # allnoconfig over both, and not olddefconfig: what neither names is off, rather than what some driver's default says.
    { cat .config; kernel_options; } > "$work/wanted"
    make -s KCONFIG_ALLCONFIG="$work/wanted" allnoconfig >> "$log" 2>&1 || fail_with_log "make allnoconfig"
    kernel_check_config
    say "kernel: compiling $(make -s kernelrelease) with $jobs jobs; log: $log"
    nice make -j"$jobs" vmlinux >> "$log" 2>&1 &
    progress $! "$log" || fail_with_log "make vmlinux"
    strip -o "$work/out/vmlinux" vmlinux
    python3 "$here/padding.py" "$work/out/vmlinux"
    readelf -n "$work/out/vmlinux" 2> /dev/null | grep -q '^  *Xen' || fail "the kernel has no PVH note (Xen ELF note)"
    cp .config "$work/out/config"
    cp System.map "$work/out/System.map"
    cd /
    mv "$work/out" "$result"
    rm -rf "$work"
    say "kernel: done in $((SECONDS - begun)) s, $(stat -c %s "$result/vmlinux") bytes: $result/vmlinux"
}

# progress PID LOG: while PID runs, tells now and then how many objects were made; its exit status.
progress() {
    local last=$SECONDS
    while kill -0 "$1" 2> /dev/null; do
        sleep 1
        if [ $((SECONDS - last)) -ge 15 ]; then
            say "kernel: $(grep -c '^  [A-Z]' "$2") steps done"
            last=$SECONDS
        fi
    done
    wait "$1"
}

fail_with_log() {
    grep -nE 'error|Error|undefined' "$log" | tail -20 >&2 || true
    tail -5 "$log" >&2
    fail "kernel: '$1' failed; log: $log"
}
