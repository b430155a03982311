-- Fields of the work hash beside a cell's device seconds, named as taxiway.contract.keys.jobs_cell and turns_cell do.
local function jobs_cell(cell) return cell .. '|jobs' end
local function turns_cell(cell) return cell .. '|turns' end
