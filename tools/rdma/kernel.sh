# The cache of tools/rdma-vm, which sources this file: CACHE/VERSION/ with
#   k/               the unpacked kernel package
#   kernel           what QEMU boots
#   siw.ko           soft-iWARP, built from the same version's sources
#   base-HASH.cpio   the initramfs, less what is a run's own
# fill_cache is what it offers; it uses rdma-vm's say and die.

# What the machine is given before it has a root; the rest it loads from the unpacked package by itself.
# crc32_generic has to be there before a soft-RoCE device is made: rdma_rxe asks for "crc32" by name, and
# "rdma link add" fails with "No such file or directory" without it.
modules=(virtio_pci 9pnet_virtio 9p overlay virtio_console crc32_generic crc32c_generic libcrc32c
  dummy virtio_net ib_uverbs rdma_ucm rdma_rxe)

download() {  # packages...: their .deb files into the current folder
  apt-get -o APT::Sandbox::User=root -q download "$@" >download.log 2>&1 ||
    { cat download.log >&2; return 1; }
}

# Sets kver: the version in the cache, or the one that the machine's linux-image-amd64 stands for.
find_version() {
  kver=''
  [ $update = 1 ] || kver=$(cat "$cache/current" 2>/dev/null || true)
  [ -z "$kver" ] || return 0
  local package
  package=$(apt-cache depends linux-image-amd64 2>/dev/null |
    sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -1)
  [ -n "$package" ] || die "apt knows no linux-image-amd64: run apt-get update"
  kver=${package#linux-image-}
}

fetch_kernel() {
  [ ! -e "$folder/k/.complete" ] || return 0
  say "fetching linux-image-$kver"
  rm -rf "$folder/k" "$folder/debs"
  mkdir -p "$folder/k" "$folder/debs"
  (cd "$folder/debs" && download "linux-image-$kver") || die "apt-get download failed (apt-get update?)"
  dpkg -x "$folder"/debs/linux-image-*.deb "$folder/k"
  rm -rf "$folder/debs"
  depmod -b "$folder/k" "$kver"
  touch "$folder/k/.complete"
}

# Unpacks the kernel that a bzImage holds: QEMU enters the plain ELF file directly (PVH), which spares the
# guest the unpacking, 7 s under TCG.  Where that can't be done the bzImage itself serves, only slower.
extract_kernel() {
  [ ! -s "$folder/kernel" ] || return 0
  local image=$folder/k/boot/vmlinuz-$kver magic offset
  for magic in '\xFD7zXZ\x00|xz -dc --single-stream' '\x28\xB5\x2F\xFD|zstd -dc'; do
    offset=$(LC_ALL=C grep -obUaP "${magic%%|*}" "$image" | head -1 | cut -d: -f1) || continue
    tail -c +$((offset + 1)) "$image" | ${magic#*|} >"$folder/kernel.new" 2>/dev/null || true
    [ "$(head -c 4 "$folder/kernel.new" | tail -c 3)" != ELF ] || break
  done
  if [ "$(head -c 4 "$folder/kernel.new" 2>/dev/null | tail -c 3)" = ELF ]; then
    mv "$folder/kernel.new" "$folder/kernel"
  else
    rm -f "$folder/kernel.new"
    cp "$image" "$folder/kernel"
  fi
}

# Debian's kernel has soft-iWARP switched off: the module is built from Debian's own source of it.
build_siw() {
  [ ! -s "$folder/siw.ko" ] || return 0
  say "building siw.ko for $kver (once)"
  local common=${kver%-*} series
  series=$(cut -d. -f1,2 <<<"$kver")
  local work=$folder/siw headers=$folder/siw/x/usr/src/linux-headers-$kver
  rm -rf "$work"
  mkdir -p "$work/m"
  (
    set -e
    cd "$work"
    download "linux-headers-$kver" "linux-headers-$common-common" "linux-kbuild-$series" "linux-source-$series"
    for deb in ./*.deb; do dpkg -x "$deb" x; done
    tar -C m --strip-components=5 -xJf "x/usr/src/linux-source-$series.tar.xz" \
      --wildcards '*/drivers/infiniband/sw/siw/*.[ch]'
    sed -i "s#/usr/src/linux-headers#$work/x&#" "$headers/Makefile"  # it expects to be installed
    { echo 'obj-m := siw.o'; echo "siw-y := $(cd m && echo *.c | sed 's/\.c/.o/g')"; } >m/Kbuild
    make -s -C "$headers" "M=$work/m" modules
    strip --strip-debug m/siw.ko
    mv m/siw.ko "$folder/siw.ko"
  ) >"$folder/siw.log" 2>&1 ||  # in a list "set -e" is off for the subshell, unless it sets it itself
    true
  [ -s "$folder/siw.ko" ] || die "siw.ko could not be built: see $folder/siw.log (or use --no-siw)"
  rm -rf "$work"
}

add_modules() {  # folder: the modules with all they need, and their order
  local module action file name
  : >"$1/order"
  for module in "${modules[@]}"; do
    while read -r action file _; do
      name=$(basename "${file%.xz}")
      if [ "$action" != insmod ] || [ -e "$1/$name" ]; then continue; fi
      case $file in *.xz) xz -dc "$file" ;; *) cat "$file" ;; esac >"$1/$name"
      strip --strip-debug "$1/$name"
      echo "$name" >>"$1/order"
    done < <(modprobe -d "$folder/k" -S "$kver" --show-depends "$module" 2>/dev/null || true)
  done
}

build_base() {  # sets base
  local hash tree
  hash=$({ cat "$parts/init" "$parts/session" "$(command -v busybox)"
    [ $siw = 0 ] || cat "$folder/siw.ko"
    echo "${modules[*]}"; } | sha256sum | cut -c1-16)
  base=$folder/base-$hash.cpio
  [ ! -s "$base" ] || return 0
  tree=$(mktemp -d "$folder/tree.XXXXXX")
  mkdir -p "$tree"/{bin,dev,proc,sys,modules,vm}
  cp "$(command -v busybox)" "$tree/bin/busybox"
  install -m 755 "$parts/init" "$tree/init"
  cp "$parts/session" "$tree/vm/session"
  add_modules "$tree/modules"
  [ $siw = 0 ] || cp "$folder/siw.ko" "$tree/vm/siw.ko"
  # Not compressed: unpacking would cost the guest more than it costs QEMU to copy some 10 MB.
  (cd "$tree" && find . | cpio -o -H newc -R 0:0 --quiet) >"$base.new"
  mv "$base.new" "$base"
  rm -rf "$tree"
}

# Sets kver, folder and base.  One at a time; a cache that can't be written serves if it is full.
fill_cache() {
  cache=${PRESYNC_CACHE:-${HOME:-/root}/.cache/presync}/rdma-vm
  mkdir -p "$cache" || die "the cache $cache can't be made"
  cache=$(realpath "$cache")
  local lock
  if [ -w "$cache" ]; then
    exec {lock}>"$cache/lock"
    flock "$lock"
  fi
  find_version
  folder=$cache/$kver
  fetch_kernel
  extract_kernel
  [ $siw = 0 ] || build_siw
  build_base
  [ "$kver" = "$(cat "$cache/current" 2>/dev/null || true)" ] || echo "$kver" >"$cache/current"
  [ -z "${lock:-}" ] || exec {lock}>&-
}
