# Shared by deploy/install and deploy/node/sepal-node. To be sourced; needs bash with `set -euo pipefail`.

say() { printf '%s: %s\n' "${0##*/}" "$*"; }
die() { printf '%s: error: %s\n' "${0##*/}" "$*" >&2; exit 1; }

# put MODE FROM TO: a new file under the old name. Who has the old one open or mapped keeps it, and
# nobody ever sees half of it. A FROM of "-" is standard input.
put() {
  local mode=$1 from=$2 to=$3
  [ "$from" != - ] || from=/dev/stdin
  mkdir -p "$(dirname "$to")"
  install -m "$mode" "$from" "$to.new.$$"
  mv -Tf "$to.new.$$" "$to"
}

# link TO NAME: the same for a symbolic link.
link() {
  mkdir -p "$(dirname "$2")"
  ln -sfn "$1" "$2.new.$$"
  mv -Tf "$2.new.$$" "$2"
}

# usage FILE: the comment at the head of a script.
usage() { sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$1"; }
