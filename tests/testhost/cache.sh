# What a test host is made of, kept in ${HUSK_CACHE:-~/.cache/husk}/testhost. Sourced by testhost, which sets here.
#
#   kernel-PACKAGE/        Debian's stock kernel and its modules, unpacked, never installed; initramfs-HASH beside them
#   qemu-VERSION/          QEMU 11 or later from Debian unstable with each library it needs, its own libc included
#
# What is there is used. To have newer ones, remove the directory.

testhost_fail() { echo "testhost: $*" >&2; exit 125; }

# Sets kernel, modules, initramfs (paths) and qemu (command words). One process at a time fills the cache; the others wait for it.
cache_fill() {
    local cache=${HUSK_CACHE:-$HOME/.cache/husk}/testhost tool missing=() init_hash
    for tool in busybox:busybox-static cpio:cpio depmod:kmod python3:python3 setpriv:util-linux flock:util-linux; do
        command -v "${tool%%:*}" > /dev/null || missing+=("${tool##*:}")
    done
    [ ${#missing[@]} = 0 ] || testhost_fail "missing packages, see tests/packages: ${missing[*]}"
    mkdir -p "$cache"
    exec {lock}> "$cache/lock"
    flock "$lock"
    local host emulator
    host=$(newest "$cache"/kernel-*) || { cache_kernel "$cache"; host=$(newest "$cache"/kernel-*); }
    emulator=$(newest "$cache"/qemu-*) || { cache_qemu "$cache"; emulator=$(newest "$cache"/qemu-*); }
    init_hash=$(cat "$here/init" "$(command -v busybox)" | sha256sum | cut -c1-12)
    initramfs=$host/initramfs-$init_hash
    [ -e "$initramfs" ] || cache_initramfs "$host" "$initramfs"
    exec {lock}>&-

    kernel=$(echo "$host"/boot/vmlinuz-*)
    modules=$(echo "$host"/lib/modules/*)
    local lib=$emulator/usr/lib/x86_64-linux-gnu
    qemu=("$lib/ld-linux-x86-64.so.2" --library-path "$lib" "$emulator/usr/bin/qemu-system-x86_64"
        -L "$emulator/usr/share/qemu" -L "$emulator/usr/share/seabios")
}

# The newest (by version) of the complete directories given; fails if there is none.
newest() {
    local directory last=''
    for directory in $(printf '%s\n' "$@" | sort -V); do
        [ -e "$directory/complete" ] && last=$directory
    done
    [ -n "$last" ] && echo "$last"
}

cache_kernel() {
    local package work=$1/.kernel
    echo "testhost: fetching Debian's stock kernel, once" >&2
    package=$(apt-cache depends linux-image-amd64 2> /dev/null | awk '/Depends/ {print $2; exit}')
    [ -n "$package" ] || testhost_fail "apt knows no linux-image-amd64 (apt-get update?)"
    rm -rf "$work"
    mkdir -p "$work"
    (cd "$work" && apt-get -qq -o APT::Sandbox::User=root download "$package" && dpkg -x ./*.deb root) ||
        testhost_fail "could not fetch or unpack $package"
    depmod -b "$work/root" "$(ls "$work/root/lib/modules")"
    touch "$work/root/complete"
    rm -rf "$1/kernel-$package"
    mv "$work/root" "$1/kernel-$package"
    rm -rf "$work"
}

# From a package list of its own: this machine's apt never learns of Debian unstable.
cache_qemu() {
    local work=$1/.qemu version deb options
    echo "testhost: fetching QEMU from Debian unstable, once" >&2
    rm -rf "$work"
    mkdir -p "$work"/root "$work"/lists/partial "$work"/cache/archives/partial
    : > "$work/status"
    apt-get indextargets --format '$(REPO_URI)' | awk '/\/debian\/?$/ && !n++ { print "deb", $1, "sid main" }' > "$work/sources"
    [ -s "$work/sources" ] || testhost_fail "apt has no Debian archive from which QEMU could come"
    options=(-qq -o APT::Sandbox::User=root -o Dir::Etc::sourcelist="$work/sources" -o Dir::Etc::sourceparts=/dev/null
        -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" -o Dir::State::status="$work/status")
    apt-get "${options[@]}" update &&
        apt-get "${options[@]}" -y --no-install-recommends --download-only install qemu-system-x86 qemu-system-data seabios > /dev/null ||
        testhost_fail "could not fetch QEMU"
    for deb in "$work"/cache/archives/*.deb; do dpkg -x "$deb" "$work/root"; done
    version=$(dpkg-deb -f "$work"/cache/archives/qemu-system-x86_*.deb Version)
    version=${version#*:}
    [ "${version%%.*}" -ge 11 ] || testhost_fail "QEMU $version is too old: before 11 nested guests hang (see README.md)"
    touch "$work/root/complete"
    rm -rf "$1/qemu-$version"
    mv "$work/root" "$1/qemu-$version"
    rm -rf "$work"
}

# busybox, the modules that mounting the 9p root needs in the order of their needs, and `init`.
cache_initramfs() {
    local work=$2.work release number=100 module file
    release=$(ls "$1/lib/modules")
    rm -rf "$work"
    mkdir -p "$work"/{bin,proc,sys,dev,lower,upper,root,modules}
    cp "$(command -v busybox)" "$work/bin/busybox"
    install -m 755 "$here/init" "$work/init"
    for module in virtio_pci 9p 9pnet_virtio overlay virtio_rng; do
        modprobe -d "$1" -S "$release" --show-depends "$module" | awk '/^insmod/ {print $2}'
    done | awk '!seen[$0]++' | while read -r file; do
        cp "$file" "$work/modules/$number-$(basename "$file")"
        number=$((number + 1))
    done
    (cd "$work" && find . | sort | cpio -o -H newc --quiet) > "$2.new"
    mv "$2.new" "$2"
    rm -rf "$work"
}
