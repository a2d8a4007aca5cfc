'use strict'
// Writes the job's summary, and stops this runner's daemon.

const fs = require('node:fs')
const path = require('node:path')
const { jobs, p2pcache, run, say, state, warn } = require('./runner.js')

function main () {
  if (state('gh')) run('gh', ['config', 'set', 'http_unix_socket', JSON.parse(state('gh')).before])
  if (state('job')) {
    const job = state('job')
    const python = state('python') || 'python3'
    const summary = p2pcache(python, ['summary'])
    if (summary.status !== 0) warn(`there is no summary: ${summary.stderr.trim()}`)
    else if (process.env.GITHUB_STEP_SUMMARY) fs.appendFileSync(process.env.GITHUB_STEP_SUMMARY, summary.stdout)
    const directory = path.dirname(path.dirname(job))
    fs.rmSync(job, { force: true })
    const started = path.join(directory, 'jobs', 'started')
    const now = p2pcache(python, ['status', '--json'])
    const pid = now.status === 0 ? String(JSON.parse(now.stdout).pid) : ''
    // Another job of this machine may use it still; or somebody else has started it, and no job of ours.
    if (jobs(directory).length > 0 || !fs.existsSync(started) || fs.readFileSync(started, 'utf8') !== pid) return
    fs.rmSync(started, { force: true })
    const stopped = p2pcache(python, ['stop'])
    if (stopped.status === 0) say(stopped.stdout.trim())
    else warn(`the daemon was not stopped: ${stopped.stderr.trim()}`)
  }
}

try {
  main()
} catch (error) {
  warn(`the cache did not end as it should: ${error.message}`)
}
