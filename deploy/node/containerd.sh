# The runtime handler "sepal" in a node's containerd configuration. To be sourced by sepal-node, which
# sets `host`, the node's root, and `prefix`. Paths in here are the node's; "$host$path" is where they are for us.
#
#   containerd 2.x    a drop-in, and an import line where the configuration imports no folder
#   containerd 1.7    lines at the end of the main file: it does not merge an imported section with
#                     its own, it throws its own away
#   k3s, RKE2         a drop-in where the configuration they generate imports a folder, otherwise
#                     lines at the end of the template it is generated from
#
# What is the administrator's stays as it is: our lines stand between two marks, and the file as it
# was before is kept beside it.

mark_begin='# BEGIN sepal: kept by its node installer'
mark_end='# END sepal'
import_mark='# sepal: kept by its node installer'
# There from a change of the configuration until containerd has read it.
pending=$prefix/restart-pending
stub_mark='# Made by the node installer of sepal; it goes with it while nothing else is in it.'

# Decides what to write. Sets `service`, `schema` (of the configuration), `main` (the file that gets
# lines, or none), `dropin` (a file of our own, or none) and `stub` (how a `main` that is not there
# begins); changes nothing.
plan() {
  dropin=
  main=
  stub=
  case $distribution in
    kubeadm) plan_containerd ;;
    k3s | rke2) plan_rancher ;;
    *) die "distribution '$distribution' is not known: want auto, kubeadm, k3s or rke2" ;;
  esac
  if [ -n "$main" ] && [ -L "$host$main" ]; then
    die "$main is a symbolic link, so another tool makes it: have that add the lines of deploy/containerd/"
  fi
}

detect() {
  [ "$distribution" = auto ] || return 0
  local name
  for name in k3s rke2; do
    if [ -d "$host/var/lib/rancher/$name/agent" ]; then
      distribution=$name
      return
    fi
  done
  distribution=kubeadm
}

plan_containerd() {
  local version folder
  service=containerd
  version=$(on_host containerd --version 2>/dev/null) ||
    die "no containerd on this node's PATH: install containerd 1.7 or 2.x, or name the distribution"
  version=$(printf '%s\n' "$version" | awk 'NR == 1 { sub(/^v/, "", $3); print $3 }')
  major=${version%%.*}
  case $version in
    1.7 | 1.7.* | [2-9].* | [1-9][0-9].*) ;;
    *) die "containerd '$version' is older than 1.7: upgrade it" ;;
  esac
  main=/etc/containerd/config.toml
  if [ -s "$host$main" ]; then
    schema=$(schema_of "$host$main")
    [ -n "$schema" ] || die "$main has no line 'version = 2' (or 3): migrate it (containerd config migrate)"
  else
    # A file of the version that this containerd writes itself.
    schema=$(on_host containerd config default | sed -n 's/^version = //p')
    [ -n "$schema" ] || die "containerd $version does not print its default configuration: make $main yourself"
    stub="$stub_mark"$'\n'"version = $schema"
  fi
  if [ "$major" -ge 2 ]; then
    folder=$(imported_folder "$host$main")
    dropin=${folder:-/etc/containerd/conf.d}/sepal.toml
    # An imported folder wants no line of ours.
    [ -z "$folder" ] || main=
  fi
}

plan_rancher() {
  local folder generated
  generated=/var/lib/rancher/$distribution/agent/etc/containerd/config.toml
  service=$(rancher_service)
  [ -s "$host$generated" ] || die "$generated is not there: start $distribution on this node first"
  schema=$(schema_of "$host$generated")
  if [ "${schema:-2}" -ge 3 ]; then
    folder=$(imported_folder "$host$generated")
    if [ -n "$folder" ]; then
      dropin=$folder/sepal.toml
      return
    fi
  fi
  # The newer template counts where there are both.
  if [ -s "$host${generated%.toml}-v3.toml.tmpl" ]; then
    main=${generated%.toml}-v3.toml.tmpl
    schema=3
  elif [ -s "$host$generated.tmpl" ]; then
    main=$generated.tmpl
    schema=2
  else
    main=$generated.tmpl
    if [ "${schema:-2}" -ge 3 ]; then main=${generated%.toml}-v3.toml.tmpl; fi
    stub="$stub_mark"$'\n''{{ template "base" . }}'
  fi
}

rancher_service() {
  local unit
  for unit in "$distribution" "$distribution-server" "$distribution-agent"; do
    if on_host systemctl is-active --quiet "$unit"; then
      printf '%s\n' "$unit"
      return
    fi
  done
  die "no service of $distribution is active on this node: start it, or name another distribution"
}

schema_of() { sed -n -E '/^[[:space:]]*\[/q; s/^[[:space:]]*version[[:space:]]*=[[:space:]]*([0-9]+).*/\1/p' "$1"; }

# The first folder of which a configuration imports every .toml file.
imported_folder() {
  local pattern
  [ -e "$1" ] || return 0
  while read -r pattern; do
    case $pattern in
      */'*.toml')
        pattern=${pattern%/*}
        # A relative one is below the configuration's own folder.
        case $pattern in /*) ;; *) pattern=/etc/containerd/$pattern ;; esac
        printf '%s\n' "$pattern"
        return
        ;;
    esac
  done < <(imports_of "$1")
}

# The strings of the top-level array `imports`, one a line.
imports_of() {
  awk '
    !inside && /^[[:space:]]*\[/ { exit }
    !inside && !/^[[:space:]]*imports[[:space:]]*=/ { next }
    {
      inside = 1
      sub(/#.*/, "")
      print
      if (/\]/) exit
    }' "$1" | grep -oE "\"[^\"]*\"|'[^']*'" | tr -d "\"'" || true
}

# --- contents ------------------------------------------------------------------------------------
handler() { # the runtime handler's section, in terms of `schema`
  local file=sepal-2.x.toml
  [ "$schema" -gt 2 ] || file=sepal-1.7.toml
  sed -n '/^\[plugins/,$p' "$here/../containerd/$file"
}

dropin_text() {
  printf '%s\nversion = %s\n\n' "$import_mark" "$schema"
  handler
}

# with_sepal FILE: what the main file is to be; FILE is what it is without us, or not there.
with_sepal() {
  if [ -z "$dropin" ]; then
    whole_lines "$1"
    printf '%s\n' "$mark_begin"
    handler
    printf '%s\n' "$mark_end"
  elif whole_lines "$1" | sed '/^[[:space:]]*\[/,$d' | grep -qE '^[[:space:]]*imports[[:space:]]*='; then
    whole_lines "$1" | awk -v path="$dropin" '
      !done && /^[[:space:]]*imports[[:space:]]*=/ { sub(/\[/, "[\"" path "\", "); done = 1 }
      { print }'
  else
    # The first line is above every section.
    printf 'imports = ["%s"] %s\n' "$dropin" "$import_mark"
    whole_lines "$1"
  fi
}

whole_lines() { # FILE: its lines, the last one ended; the stub's where it is not there
  if [ -s "$1" ]; then
    cat "$1"
    [ -z "$(tail -c 1 "$1")" ] || echo
  else
    printf '%s\n' "$stub"
  fi
}

# without_sepal FILE: the file's lines but ours.
without_sepal() {
  sed -e "/^$mark_begin/,/^$mark_end/d" -e "/^imports = .* $import_mark/d" \
    -e 's|"/etc/containerd/conf\.d/sepal\.toml", ||' "$1"
}

# What containerd makes of a main file and its imports.
effective() {
  if [ "$major" -ge 2 ]; then
    on_host containerd --config "$1" config migrate
  else
    on_host containerd --config "$1" config dump
  fi
}

# --- changes -------------------------------------------------------------------------------------
backup_of() { printf '%s.before-sepal\n' "$1"; }

# Brings the configuration to what it should be. Sets `changed` when it was not, and keeps in $work
# what undo_containerd needs; `did_containerd` says that there is something to undo.
configure_containerd() {
  local before
  changed=
  if [ -n "$main" ] && [ -e "$host$main" ]; then without_sepal "$host$main" >"$work/pristine"; fi
  # A run that was killed between the change and the restart.
  if [ -e "$host$pending" ]; then changed=yes; fi
  if by_hand; then return; fi
  if [ -n "$main" ]; then
    with_sepal "$work/pristine" >"$work/main"
    cmp -s "$work/main" "$host$main" || changed=yes
  fi
  if [ -n "$dropin" ]; then
    dropin_text >"$work/dropin"
    cmp -s "$work/dropin" "$host$dropin" || changed=yes
  fi
  [ -n "$changed" ] || return 0

  before=
  if [ "$distribution" = kubeadm ] && [ -e "$host/etc/containerd/config.toml" ]; then
    effective /etc/containerd/config.toml >"$work/before" 2>"$work/said" ||
      die "containerd does not accept its own configuration: $(tail -n 1 "$work/said")"
    before=yes
  fi
  [ ! -e "$host$main" ] || [ -z "$main" ] || cp -p "$host$main" "$work/main.old"
  [ ! -e "$host$dropin" ] || [ -z "$dropin" ] || cp -p "$host$dropin" "$work/dropin.old"
  did_containerd=yes
  touch "$host$pending"

  if [ -n "$dropin" ]; then put 644 "$work/dropin" "$host$dropin"; fi
  if [ -n "$main" ] && ! cmp -s "$work/main" "$host$main"; then
    # The administrator's file as it was before us, mode and owner included.
    if [ -e "$work/main.old" ] && cmp -s "$work/pristine" "$work/main.old"; then
      cp -p "$work/main.old" "$host$(backup_of "$main")"
    fi
    replace_main "$work/main"
  fi
  [ "$distribution" != kubeadm ] || verify "$before"
}

# An administrator's own handler is left as it is.
by_hand() {
  local file=
  if [ -e "$work/pristine" ] && grep -q "^[^#]*containerd\.runtimes\.sepal[].]" "$work/pristine"; then
    file=$main
  elif [ -n "$dropin" ] && [ -e "$host$dropin" ] && ! is_our_dropin "$host$dropin"; then
    file=$dropin
  fi
  [ -n "$file" ] || return 1
  say "the handler sepal is in $file already, made by hand: left as it is"
}

is_our_dropin() { head -n 1 "$1" | grep -qxF "$import_mark"; }

replace_main() { # FILE: its content under the main file's name, mode and owner
  mkdir -p "$host$(dirname "$main")"
  if [ -e "$host$main" ]; then cp -p "$host$main" "$host$main.new"; else install -m 644 /dev/null "$host$main.new"; fi
  cat "$1" >"$host$main.new"
  mv -Tf "$host$main.new" "$host$main"
}

# containerd itself says whether it finds the handler, and whether all else is as it was.
verify() { # BEFORE
  effective /etc/containerd/config.toml >"$work/after" 2>"$work/said" ||
    die "containerd does not accept the configuration with the handler sepal: $(tail -n 1 "$work/said")"
  grep -q 'containerd\.runtimes\.sepal\]' "$work/after" ||
    die "containerd does not see the handler sepal${dropin:+ in $dropin}: another imported file has a section of the CRI plugin; add the lines of deploy/containerd/ there"
  if [ -n "$1" ] && diff <(grep -v '^imports = ' "$work/before") <(grep -v '^imports = ' "$work/after") | grep -q '^<'; then
    die "with the handler sepal containerd would lose settings it has now: add the lines of deploy/containerd/ to its configuration by hand"
  fi
}

# Back to what configure_containerd found.
undo_containerd() {
  if [ -n "$dropin" ]; then
    if [ -e "$work/dropin.old" ]; then cp -p "$work/dropin.old" "$host$dropin"; else remove_file "$dropin"; fi
  fi
  if [ -n "$main" ]; then
    if [ -e "$work/main.old" ]; then
      mv -f "$work/main.old" "$host$main"
      ! cmp -s "$host$main" "$host$(backup_of "$main")" || rm -f "$host$(backup_of "$main")"
    else
      remove_file "$main"
    fi
  fi
}

# Takes the handler out of every place where a run of ours may have put it: what `plan` says today need
# not be what it said then. Sets `changed`.
unconfigure_containerd() {
  local file folder
  changed=
  if [ -e "$host$pending" ]; then changed=yes; fi
  while read -r file; do
    [ -f "$host$file" ] && [ ! -L "$host$file" ] || continue
    remove_from "$file"
  done < <(
    echo /etc/containerd/config.toml
    for folder in k3s rke2; do
      printf "/var/lib/rancher/$folder/agent/etc/containerd/%s\n" config.toml.tmpl config-v3.toml.tmpl
    done
  )
  for file in "$host"/etc/containerd/*/sepal.toml "$host"/var/lib/rancher/*/agent/etc/containerd/*/sepal.toml \
    ${dropin:+"$host$dropin"}; do
    if [ -f "$file" ] && is_our_dropin "$file"; then
      change
      remove_file "${file#"$host"}"
    fi
  done
}

# The configuration is about to change.
change() {
  changed=yes
  [ ! -d "$host$prefix" ] || touch "$host$pending"
}

remove_from() { # MAIN: a file that may have lines of ours
  local main=$1 backup
  backup=$host$(backup_of "$1")
  without_sepal "$host$main" >"$work/pristine"
  if ! cmp -s "$work/pristine" "$host$main"; then
    change
    if [ "$(head -n 1 "$work/pristine")" = "$stub_mark" ] && [ "$(wc -l <"$work/pristine")" -eq 2 ]; then
      remove_file "$main"
    elif [ -e "$backup" ] && [ "$(cat "$backup")" = "$(cat "$work/pristine")" ]; then
      # To the byte, its last line's end included.
      mv -f "$backup" "$host$main"
    else
      replace_main "$work/pristine"
    fi
  fi
  rm -f "$backup"
}

remove_file() { # FILE, and the folders in which there was nothing else
  local folder
  rm -f "$host$1"
  folder=$(dirname "$1")
  while [ "$folder" != / ] && [ "$folder" != /etc ] && rmdir "$host$folder" 2>/dev/null; do
    folder=$(dirname "$folder")
  done
}

restart_containerd() {
  say "restarting $service: the configuration of containerd has changed"
  restarted=yes
  on_host systemctl restart "$service" || return 1
  on_host systemctl is-active --quiet "$service" || return 1
  rm -f "$host$pending"
  [ "$distribution" != kubeadm ] || return 0
  # These write containerd's configuration when they start.
  local generated=/var/lib/rancher/$distribution/agent/etc/containerd/config.toml waited=0
  until [ -n "$dropin" ] || [ -n "${1:-}" ] || grep -q 'containerd\.runtimes\.sepal\]' "$host$generated"; do
    [ $((waited += 1)) -le 60 ] || return 1
    sleep 1
  done
}
