# What every process of a job runs: the words it is given, in its own place.
#
#   sh resume.sh train --preset nano --data TEXT --out RUN --mesh fsdp=8
#
# `train` means `hybrid-jax train`, and gets --resume if the run of its --out is there already, so
# that a job that is started again goes on. The processes agree on that, for each looks before it
# joins the others and a run is written only after all have joined. It is run by any POSIX shell.
run='' asked='' previous=''
if [ "$1" = train ]; then
  for word; do
    if [ "$previous" = --out ]; then run=$word; fi
    case $word in
      --out=*) run=${word#--out=} ;;
      --resume | --no-resume) asked=yes ;;
    esac
    previous=$word
  done
  if [ -n "$run" ] && [ -z "$asked" ] && [ -f "$run/config.yaml" ]; then set -- "$@" --resume; fi
  set -- hybrid-jax "$@"
fi
exec "$@"
