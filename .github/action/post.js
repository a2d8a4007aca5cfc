'use strict'
// Writes the job's summary, and stops this runner's daemon.

const fs = require('node:fs')
const { run, say, state, warn } = require('./runner.js')

function main () {
  if (state('gh')) run('gh', ['config', 'set', 'http_unix_socket', JSON.parse(state('gh')).before])
  if (state('running')) {
    const cli = [state('python') || 'python3', ['-m', 'httpx_p2pcache.cli']]
    const summary = run(cli[0], [...cli[1], 'summary'])
    if (summary.status !== 0) warn(`there is no summary: ${summary.stderr.trim()}`)
    else if (process.env.GITHUB_STEP_SUMMARY) fs.appendFileSync(process.env.GITHUB_STEP_SUMMARY, summary.stdout)
    if (state('running') !== 'ours') return // another job of this machine has started it, and may use it still
    const stopped = run(cli[0], [...cli[1], 'stop'])
    if (stopped.status === 0) say(stopped.stdout.trim())
    else warn(`the daemon was not stopped: ${stopped.stderr.trim()}`)
  }
}

try {
  main()
} catch (error) {
  warn(`the cache did not end as it should: ${error.message}`)
}
