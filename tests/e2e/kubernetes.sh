#!/usr/bin/env bash
# Kubernetes' own programs, from Debian 12's source package: kube-apiserver, kube-controller-manager, kube-scheduler,
# kubelet, kube-proxy and kubectl, built with Debian's Go. No network but Debian's archive is used. Prints the folder they are in.
#
# They are kept in ${XDG_CACHE_HOME:-~/.cache}/flatwire, with their checksums, and built once: about ten minutes of one processor.
# What apt needs for source packages stands in that folder and not in the machine's own configuration.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
say() { echo "kubernetes: $*" >&2; }
package=kubernetes version=1.20.2
programs=(kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubectl)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/flatwire
kept=$cache/kubernetes-$version
mkdir -p "$cache"
exec 9>"$cache/lock"
flock -n 9 || { say "waiting for another build"; flock 9; }
if (cd "$kept" 2>/dev/null && ls "${programs[@]}" >/dev/null 2>&1 && sha256sum --quiet --check SHA256SUMS >&2); then
  echo "$kept"
  exit
fi
started=$SECONDS
release=$(. /etc/os-release && echo "${VERSION_CODENAME:-unknown}")
[ "$release" = bookworm ] || {
  say "this builds on Debian 12 (bookworm), and here is $release; put ${programs[*]} of v$version into $kept, with a SHA256SUMS"
  exit 2
}
# Not the go of PATH: this tree is of the age of Debian's.
go=/usr/lib/go-1.19/bin/go
need=()
[ -x $go ] || need+=(golang-1.19-go)
command -v dpkg-source >/dev/null || need+=(dpkg-dev)
if [ ${#need[@]} -gt 0 ]; then
  say "installing ${need[*]} with apt-get"
  "$here/../apt.sh" "${need[@]}"
fi

# A build that was cut short goes on where it was: Go keeps what it compiled.
work=$cache/build-$version
tree=$work/gopath/src/k8s.io/kubernetes
mkdir -p "$work"/{apt/parts,apt/lists/partial,bin,gopath/src/k8s.io}
if [ ! -f "$work/unpacked" ]; then
  say "fetching Debian's source package (34 MB)"
  for file in /etc/apt/sources.list.d/*.sources; do
    # Whatever Debian mirror this machine uses, asked for sources.
    [ ! -f "$file" ] || sed 's/^Types:.*/Types: deb-src/' "$file" >"$work/apt/parts/${file##*/}"
  done
  if [ -f /etc/apt/sources.list ]; then sed -n 's/^deb /deb-src /p' /etc/apt/sources.list >"$work/apt/parts/machine.list"; fi
  apt=(-qq -o Dir::Etc::SourceList=/dev/null -o "Dir::Etc::SourceParts=$work/apt/parts" -o "Dir::State::Lists=$work/apt/lists"
    -o Dir::Cache::srcpkgcache= -o Dir::Cache::pkgcache= -o APT::Sandbox::User=root)
  apt-get "${apt[@]}" update >&2
  rm -rf "$tree"
  (cd "$work" && apt-get "${apt[@]}" source --download-only "$package" >/dev/null)
  # apt has checked the archive's signature over this file; dpkg-source warns that it cannot.
  dpkg-source --no-check --extract "$work"/kubernetes_*.dsc "$tree" >/dev/null
  grep -q "really$version" "$work"/kubernetes_*.dsc || {
    say "Debian's source package is no longer $version: $(ls "$work"/*.dsc); change the version in $0"
    exit 1
  }
  touch "$work/unpacked"
fi

export GO111MODULE=off GOPROXY=off GOFLAGS='' GOPATH=$work/gopath GOCACHE=$work/gocache CGO_ENABLED=0
unset GOROOT
cd "$tree"
# Go names each package as it compiles it: a line for every two hundred shows that it lives.
build() {
  local name=$1 out=$2 of=$3 from=$SECONDS
  nice -n 19 "$go" build -v -trimpath -ldflags "$flags" -o "$out" "$of" 2>&1 |
    awk -v name="$name" '!/^(k8s.io|vendor)\// && !/^[a-z0-9\/.-]+$/ { print; next }
      ++n % 200 == 0 { print "kubernetes: " name ": " n " packages compiled"; fflush() }' >&2
  say "$name: $((SECONDS - from)) s"
}
flags="-s -w"
for place in k8s.io/component-base/version k8s.io/kubernetes/vendor/k8s.io/component-base/version \
  k8s.io/kubernetes/vendor/k8s.io/client-go/pkg/version; do
  flags+=" -X $place.gitVersion=v$version -X $place.gitMajor=1 -X $place.gitMinor=20 -X $place.gitTreeState=clean"
done
generated=pkg/generated/openapi/zz_generated.openapi.go
if [ ! -f $generated ]; then
  say "building; ten minutes of one processor, less with more"
  # Debian leaves generated files out. The API server cannot do without this one, and its generator is in the tree.
  build openapi-gen "$work/bin/openapi-gen" k8s.io/kubernetes/vendor/k8s.io/kube-openapi/cmd/openapi-gen
  inputs=$(grep -rl '+k8s:openapi-gen=' --include='*.go' vendor/k8s.io/*/ pkg cmd | xargs -n 1 dirname | sort -u |
    grep -vE '_examples|testdata|sample|openapi-gen|/generators|kube-openapi' | sed 's,^,k8s.io/kubernetes/,' | paste -sd,)
  "$work/bin/openapi-gen" --logtostderr --go-header-file hack/boilerplate/boilerplate.generatego.txt \
    --output-file-base zz_generated.openapi.part --output-package k8s.io/kubernetes/pkg/generated/openapi \
    --output-base "$work/gopath/src" --input-dirs "$inputs" --report-filename "$work/violations.txt" >"$work/openapi.log" 2>&1 ||
    { tail -5 "$work/openapi.log" >&2; exit 1; }
  mv "${generated%.go}.part.go" $generated
fi
for program in "${programs[@]}"; do build "$program" "$work/bin/$program" "k8s.io/kubernetes/cmd/$program"; done
rm -rf "$kept"
mkdir "$kept"
for program in "${programs[@]}"; do
  if [ "$program" = kubectl ]; then said=$("$work/bin/kubectl" version --client --short); else said=$("$work/bin/$program" --version); fi
  [[ $said =~ :?\ v$version$ ]] || { say "$program calls itself $said"; exit 1; }
  mv "$work/bin/$program" "$kept/"
done
(cd "$kept" && sha256sum "${programs[@]}" >SHA256SUMS)
chmod -R u+w "$work" && rm -rf "$work"
say "built in $((SECONDS - started)) s, kept in $kept ($(du -sm "$kept" | cut -f1) MB)"
echo "$kept"
