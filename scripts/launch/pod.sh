# The first process of a pod: it runs what comes after the text of resume.sh by that text, passes on
# Kubernetes' request to stop, and then fails on purpose.
#
# A run that was asked to stop ends well, and a pod that ends well is done for Kubernetes: the rest of
# the job set would be waited for, or all of it called complete, with the run half-way. As a failure
# it is what it should be, a reason to start the job set again.
resume=$1
shift
child='' stopped=''
trap 'stopped=yes; kill -TERM $child 2>/dev/null' TERM
sh -c "$resume" resume.sh "$@" &
child=$!
if [ -n "$stopped" ]; then kill -TERM "$child"; fi
# A signal ends `wait` too, while the child still lives.
while :; do
  wait "$child"
  status=$?
  kill -0 "$child" 2>/dev/null || break
done
if [ -n "$stopped" ] && [ "$status" -eq 0 ]; then
  echo 'Stopped on request; this pod fails so that the job set is started again.' >&2
  status=143
fi
exit "$status"
