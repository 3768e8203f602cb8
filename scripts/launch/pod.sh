# The first process of a pod: it runs what comes after the text of resume.sh by that text, passes on
# Kubernetes' request to stop, and fails if it was asked to.
#
# A run that was asked to stop, or whose step hung, ends with exit code 75, which to Kubernetes is a
# failure, and so a reason to start the job set again. Whatever ends well after the request has to fail
# here: a pod that ends well is done, and the job set would be called complete half-way.
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
