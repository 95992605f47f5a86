-- What a run of wrk came to, as one line of JSON.
done = function(summary)
  local errors = summary.errors
  local failed = {}
  for _, kind in ipairs({"connect", "read", "write", "status", "timeout"}) do
    if errors[kind] > 0 then table.insert(failed, errors[kind] .. " by " .. kind) end
  end
  print(string.format(
    '{"requests": %d, "seconds": %f, "bytes": %d, "failed": "%s"}',
    summary.requests, summary.duration / 1e6, summary.bytes, table.concat(failed, ", ")))
end
